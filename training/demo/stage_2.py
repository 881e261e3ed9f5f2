"""As in LLaVA's second stage, the projector and the language model learn together.

The tower stays as shipped, so its features are those of `features.py`. The projector begins as
shipped; the language model's matrices get a low-rank update. Each step: some pictures with several
prompts each, distilled from `teacher.pt` (seeing must answer as being told), half of those about
facts of training countries, and of names, answered truly instead, as LLaVA's instructions are; and
some texts of `texts.py` without pictures, on which the model must stay what it was.

    python training/demo/stage_2.py --folder WORK_FOLDER --every 40
"""

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from captions import load_language_model
from distillation import Answered, Packed, Teacher, answers, divergence, hidden_states
from loop import Run, decayed, evenly, load_average, trained
from lora import add_low_rank
from safetensors.torch import load_file
from student import Student
from teacher import low_precision
from torch import Tensor, nn

#: texts that are not trained on
VALIDATION_TEXTS = 60
#: pictures that are encoded at once in validation
CHUNK = 20


class Tuned(nn.Module):
    """What is trained: the projector, and low-rank factors inside the frozen language model."""

    def __init__(self, language_model: Any, rank: int, alpha: float) -> None:
        super().__init__()
        self.language_model = language_model
        add_low_rank(language_model, rank, alpha)
        self.multi_modal_projector = Student.shipped().projector

    def seen(self, features: Tensor, packed: Packed) -> Answered:
        """What the prompts are answered behind these pictures."""
        visual = self.multi_modal_projector(features.float())
        return answers(self.language_model, visual, packed)

    def changed(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """KL(base || tuned) on texts, mean over their positions."""
        found = hidden_states(self.language_model, input_ids=tokens)
        return divergence(self.language_model, hidden.float(), found)[0].mean()


class Data:
    """Everything that was computed once, and the batches made of it."""

    def __init__(self, arguments: argparse.Namespace, tokenizer: Any) -> None:
        folder = arguments.folder
        self.pictures, self.prompts = arguments.pictures, arguments.prompts
        self.n_texts = arguments.texts
        self.teacher = Teacher.load(folder, tokenizer, arguments.truth_share)
        self.features = load_file(folder / "features.safetensors")
        self.texts = load_file(folder / "texts.safetensors")

    def flags(self, countries: list[int], rng: torch.Generator) -> tuple[Tensor, Packed]:
        """Features of a picture of each country, and prompts about it."""
        features = self.features["train"]
        which = torch.randint(features.shape[1], (len(countries),), generator=rng)
        return features[countries, which], self.teacher.pack(countries, self.prompts, rng)

    def some_texts(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Texts for training: tokens and the base model's hidden states."""
        count = len(self.texts["tokens"]) - VALIDATION_TEXTS
        rows = VALIDATION_TEXTS + torch.randperm(count, generator=rng)[: self.n_texts]
        return self.texts["tokens"][rows], self.texts["hidden"][rows]


@torch.no_grad()
def validate(tuned: Tuned, data: Data) -> dict[str, float]:
    """The losses on augmentations and texts that are never trained on; the same at every call."""
    rng, features = torch.Generator().manual_seed(0), data.features["validation"].flatten(0, 1)
    order = torch.randperm(len(features), generator=rng)
    found = []
    for rows in order[: 5 * CHUNK].split(CHUNK):
        countries = (rows // data.features["validation"].shape[1]).tolist()
        packed = data.teacher.pack(countries, data.prompts, rng)
        found.append(tuned.seen(features[rows], packed))
    means = {
        name: float(torch.stack([getattr(each, name) for each in found]).mean())
        for name in ("told", "truth", "equal")
    }
    texts = {name: tensor[:VALIDATION_TEXTS].split(CHUNK) for name, tensor in data.texts.items()}
    changed = [tuned.changed(*pair) for pair in zip(texts["tokens"], texts["hidden"], strict=True)]
    return {**means, "changed": float(torch.stack(changed).mean())}


def train(arguments: argparse.Namespace, tuned: Tuned, data: Data) -> None:
    """The training loop; goes on from its checkpoint where there is one."""
    rng = torch.Generator().manual_seed(arguments.seed)
    factors = {name: p for name, p in trained(tuned).items() if "lora_" in name}
    groups = decayed(tuned.multi_modal_projector, arguments.projector_lr, 0.0)
    groups.append({"params": list(factors.values()), "weight_decay": 0.0, "peak": arguments.lr})
    file = arguments.folder / arguments.name
    run = Run(tuned, groups, file, steps=arguments.steps, follow=0.98, warmup=30)
    if arguments.resume:
        run.resume(rng)
    run.report(**validate(tuned, data))
    order = evenly(len(data.features["train"]), rng)
    while run.step < arguments.steps:
        seen = tuned.seen(*data.flags(list(islice(order, data.pictures)), rng))
        changed = tuned.changed(*data.some_texts(rng))
        answered = seen.told + arguments.truth_weight * seen.truth
        run.learn(answered + arguments.text_weight * changed)
        if run.step % 10 == 0:
            run.report(told=seen.told, truth=seen.truth, equal=seen.equal, changed=changed)
        if run.step % arguments.every == 0 or run.step == arguments.steps:
            run.save(rng, rank=arguments.rank, alpha=arguments.alpha)
            now = {name: p.detach().clone() for name, p in trained(tuned).items()}
            load_average(tuned, run.average.average)
            print("validation, averaged weights:", end=" ")
            run.report(**validate(tuned, data))
            load_average(tuned, now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--pictures", type=int, default=10, help="in a step")
    parser.add_argument("--prompts", type=int, default=8, help="about each picture")
    parser.add_argument("--texts", type=int, default=8, help="without a picture, in a step")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--lr", type=float, default=5e-4, help="of the low-rank update")
    parser.add_argument("--projector-lr", type=float, default=1e-4)
    parser.add_argument("--truth-share", type=float, default=0.5, help="of prompts with one")
    parser.add_argument("--truth-weight", type=float, default=0.5, help="of true answers")
    parser.add_argument("--text-weight", type=float, default=1.0)
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--name", default="stage_2.pt", help="the checkpoint's file name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model, tokenizer = load_language_model()
    tuned = Tuned(low_precision(model), arguments.rank, arguments.alpha)
    data = Data(arguments, tokenizer)
    train(arguments, tuned, data)


if __name__ == "__main__":
    main()
