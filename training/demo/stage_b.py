"""Through the frozen language model, seeing a flag must answer as being told its country.

Not used for the shipped weights: stage A went further in the same time (`docs/demo-model.md`).

Each step: some pictures with several prompts each, packed behind one visual prefix (block mask,
positions restarted at every prompt), distilled from `teacher.pt`; and more pictures for stage A's
loss alone, which costs little and is all that held-out countries get beside naming.

    python training/demo/stage_b.py --folder WORK_FOLDER --start WORK_FOLDER/stage_a2.pt
"""

import argparse
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from augment import Augmentation
from captions import caption_tokens, load_language_model
from stage_a import CaptionTarget, evaluate, learning_rate, load_average, new_optimizer, refit
from student import N_VISUAL, Ema, Pictures, Student, evenly, save_atomically
from teacher import DEPTH, Asked, low_precision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

#: how often a prompt of a relation is drawn, relative to one prompt of the scored relations
NAMING_SHARE = 0.15
AUXILIARY_SHARE = 0.2


@dataclass
class Packed:
    """Prompts behind their visual prefixes, ready for the language model."""

    tokens: Tensor  #: [batch, length] of the text part
    positions: Tensor  #: [batch, 1 + 64 + length]
    mask: Tensor  #: [batch, 1, all, all], True where attention is allowed
    readout: Tensor  #: [batch, prompts, DEPTH]: where the answers' tokens are predicted
    hidden: Tensor  #: [batch, prompts, DEPTH, width]: the teacher's


class Teacher:
    """Draws prompts for countries, balanced between relations, and packs them."""

    def __init__(self, asked: list[Asked]) -> None:
        self.asked = asked
        self.row = [{int(c): i for i, c in enumerate(item.countries)} for item in asked]
        relations = sorted({item.relation for item in asked})
        by_relation = {
            name: [i for i, item in enumerate(asked) if item.relation == name] for name in relations
        }
        scored = [name for name in relations if name not in ("name", "auxiliary")]
        weight = torch.zeros(len(asked))
        for name, members in by_relation.items():
            fixed = {"name": NAMING_SHARE, "auxiliary": AUXILIARY_SHARE}
            rest = (1 - sum(fixed.values())) / len(scored)
            weight[members] = fixed.get(name, rest) / len(members)
        self.weight = weight

    def draw(self, country: int, count: int, rng: torch.Generator) -> list[int]:
        """Different prompts that may be asked about the country."""
        allowed = torch.tensor([country in row for row in self.row])
        weight = self.weight * allowed
        count = min(count, int(allowed.sum()))
        return torch.multinomial(weight, count, generator=rng).tolist()

    def pack(self, countries: list[int], count: int, rng: torch.Generator) -> Packed:
        """Prompts for each country in one row; a row with fewer ones repeats some."""
        start = 1 + N_VISUAL
        rows = []
        for country in countries:
            drawn = self.draw(country, count, rng)
            drawn = (drawn * count)[:count]
            rows.append([(i, self.row[i][country]) for i in drawn])
        texts = [
            [self.asked[i].prompt + self.asked[i].answer[r, :-1].tolist() for i, r in row]
            for row in rows
        ]
        length = max(sum(map(len, row)) for row in texts)
        batch = len(rows)
        tokens = torch.zeros(batch, length, dtype=torch.long)
        positions = torch.arange(start + length).repeat(batch, 1)
        block = torch.full((batch, start + length), -1)
        block[:, :start] = 0
        readout = torch.zeros(batch, count, DEPTH, dtype=torch.long)
        for b, row in enumerate(texts):
            at = 0
            for p, text in enumerate(row):
                place = slice(start + at, start + at + len(text))
                tokens[b, at : at + len(text)] = torch.tensor(text)
                positions[b, place] = start + torch.arange(len(text))
                block[b, place] = p + 1
                readout[b, p] = start + at + len(text) - DEPTH + torch.arange(DEPTH)
                at += len(text)
        same = block[:, :, None] == block[:, None, :]
        causal = torch.ones(start + length, start + length, dtype=torch.bool).tril()
        mask = (same | (block == 0)[:, None, :]) & causal
        hidden = torch.stack(
            [torch.stack([self.asked[i].hidden[r] for i, r in row]) for row in rows]
        )
        return Packed(tokens, positions, mask[:, None], readout, hidden.float())


def distillation(model: Any, visual: Tensor, packed: Packed) -> Tensor:
    """KL(told || seen) at every kept position, the answer's first token counting most."""
    embed = model.get_input_embeddings()
    bos = torch.full((len(visual), 1), model.config.bos_token_id)
    inputs = torch.cat([embed(bos), visual.float(), embed(packed.tokens)], 1)
    hidden = model.model(
        inputs_embeds=inputs,
        attention_mask=packed.mask,
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    rows = torch.arange(len(visual))[:, None, None]
    seen = model.lm_head(hidden[rows, packed.readout]).float().log_softmax(-1)
    with torch.no_grad():
        told = model.lm_head(packed.hidden).float().log_softmax(-1)
    divergence = F.kl_div(seen, told, log_target=True, reduction="none").sum(-1)
    weight = torch.tensor([1.0] + [0.4] * (DEPTH - 1))
    return (divergence * weight).mean((0, 1)).sum() / weight.sum()


def train(arguments: argparse.Namespace, model: Any, tokenizer: Any, pictures: Pictures) -> None:
    """The training loop; goes on from its checkpoint where there is one."""
    torch.manual_seed(arguments.seed)
    rng = torch.Generator().manual_seed(arguments.seed + 1)
    embedding, captions = model.get_input_embeddings().weight, caption_tokens(tokenizer)
    target = CaptionTarget(embedding, captions, arguments.name_weight)
    teacher = Teacher([Asked(**item) for item in torch.load(arguments.folder / "teacher.pt")])
    student = Student(len(pictures.codes))
    load_average(student, torch.load(arguments.start)["average"])
    if arguments.refit:
        refit(student, pictures, target, arguments.refit, rng)
        print(f"refitted: {evaluate(student, pictures, target)}", flush=True)
    optimizer, average = new_optimizer(student, 0.02), Ema(student, 0.99)
    file, start = arguments.folder / "stage_b.pt", 0
    if arguments.resume and file.exists():
        state: dict[str, Any] = torch.load(file)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        average.average, average.steps, start = state["average"], state["step"], state["step"]
        rng.set_state(state["rng"])
    order, settings, begun = evenly(len(pictures.codes), rng), Augmentation(), time.time()
    for step in range(start, arguments.steps):
        countries = torch.tensor(list(islice(order, arguments.seen + arguments.extra)))
        pixels = pictures.training_batch(countries, settings, rng)
        packed = teacher.pack(countries[: arguments.seen].tolist(), arguments.prompts, rng)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            visual, logits = student(pixels)
            divergence = distillation(model, visual[: arguments.seen], packed)
        tokens, error, right = target(visual, countries)
        naming = F.cross_entropy(logits.float(), countries, label_smoothing=0.05)
        loss = divergence + arguments.stage_a_weight * (
            naming + tokens + arguments.error_weight * error
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.lr, warmup=20)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        average.update(student)
        if step % 10 == 0:
            print(
                f"{step} {time.time() - begun:.0f}s KL {divergence:.3f} naming {naming:.3f} "
                f"tokens {tokens:.3f} error {error:.3f} right {right:.3f}",
                flush=True,
            )
        if (step + 1) % 100 == 0 or step + 1 == arguments.steps:
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"average": average.average, "step": step + 1, "rng": rng.get_state()}
            save_atomically(state, file)
            averaged = Student(len(pictures.codes))
            load_average(averaged, average.average)
            print(f"{step + 1} {evaluate(averaged, pictures, target)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True, help="stage A's checkpoint")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seen", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--extra", type=int, default=36)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--stage-a-weight", type=float, default=0.3)
    parser.add_argument("--name-weight", type=float, default=4.0)
    parser.add_argument("--error-weight", type=float, default=4.0)
    parser.add_argument("--refit", type=int, default=0, help="batches for least squares, first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    model, tokenizer = load_language_model()
    train(arguments, low_precision(model), tokenizer, Pictures.load(arguments.folder))


if __name__ == "__main__":
    main()
