"""How much memory the cells of a trace hold, by `batch_rows`.

    export MALLOC_MMAP_THRESHOLD_=65536    # memory that was freed goes back to the system at once
    OMP_NUM_THREADS=1 python benchmarks/batch_rows.py --shape smolvlm-256m --layers 2 --rows 1 16 64

Records the clean run and the corrupted one, and then computes the same cells (`mlp_out` at every
text position) with a few `batch_rows`, each in a process that is forked from there, so that none
has memory that another has left. What is given is the most that such a process holds above what it
began with: the weights and what has been recorded. Writes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from measuring import machine, megabytes, table, write
from shapes import SHAPES, build

from mmlens import Intervention, hook_name
from mmlens.branching.recording import Recording
from mmlens.interventions.functions import restore
from mmlens.utils.memory import peak_memory


def held(
    device: torch.device, run: Callable[[int | None], torch.Tensor]
) -> tuple[int, torch.Tensor]:
    """The most memory that a call holds in a process of its own, in bytes, and its result.

    Args:
        device: where it computes.
        run: computes so many cells, or all.
    """
    ours, theirs = multiprocessing.Pipe()

    def child(end: Connection) -> None:
        with torch.no_grad():
            run(1)  # what a fork shares is held once it is touched
            with peak_memory(device) as peak:
                found = run(None)
        end.send((peak.size, found.tolist()))

    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    size, found = ours.recv()
    process.join()
    return size, torch.tensor(found)


@torch.no_grad()
def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="smolvlm-256m")
    parser.add_argument("--layers", type=int, help="of the decoder; by default all")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16], help="batch_rows")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not outlive a fork
    case = build(options.shape, n_layers=options.layers)
    layers = range(case.model.cfg.n_layers)
    positions = range(case.constraint[0], case.clean.n_pos)
    with peak_memory(case.device) as recorded:
        names = [hook_name("mlp_out", layer) for layer in layers]
        clean = Recording.of(case.model, case.clean, names)
        corrupted = clean.record(case.corrupted)
    answer = int(clean.logits()[0, -1].argmax())
    put_back = restore(clean.cache)
    cells = [
        [Intervention("mlp_out", layer, position, put_back)]
        for position in positions
        for layer in layers
    ]

    def probabilities(n: int | None, size: int | None) -> torch.Tensor:
        return corrupted.run(
            cells[:n], lambda logits: logits[:, -1].softmax(-1)[:, answer], batch_rows=size
        )[:, 0]

    measured = {
        size: held(case.device, lambda n, size=size: probabilities(n, size))
        for size in sorted(options.rows)
    }
    reference = next(iter(measured.values()))[1]
    rows = [
        [str(n), megabytes(size), f"{float((found - reference).abs().max()):.0e}"]
        for n, (size, found) in measured.items()
    ]
    header = ["batch_rows", "peak memory of the cells, MB", "largest difference"]
    visual = int(case.clean.is_image.sum())
    text = (
        f"# Memory of a trace's cells, by batch_rows: {case.name}\n\n"
        f"{machine(case.device)}; {str(case.model.cfg.dtype).removeprefix('torch.')}.\n\n"
        f"{case.clean.n_pos:,} positions, of which {visual:,} visual; {len(cells)} cells, "
        f"`mlp_out` at {len(positions)} positions. Recording the clean and the corrupted run takes "
        f"{megabytes(recorded.size)} MB at most, the vision tower's pass included. Differences are "
        f"between probabilities of the answer, from those with the first `batch_rows`.\n\n"
        f"{table(header, rows)}\n"
    )
    write(f"batch-rows-{options.shape}-{case.device.type}", text)


if __name__ == "__main__":
    main()
