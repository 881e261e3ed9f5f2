"""Step 2: the tower and the projector learn to say, in the language model's own input embeddings,
" A photo of the flag of France." when they see it. The language model itself does not run.

    python training/demo/stage_a.py --folder WORK_FOLDER --steps 1500
"""

import argparse
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from augment import Augmentation
from captions import caption_tokens, load_language_model
from loop import Run, decayed, evenly, load_average
from student import TRAINED, UNSEEN, Pictures, Student
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class CaptionTarget(nn.Module):
    """How far visual tokens are from the embeddings of a caption."""

    def __init__(self, embedding: Tensor, captions: Tensor, name_weight: float = 1.0) -> None:
        super().__init__()
        self.captions = captions
        self.used, inverse = captions.unique(return_inverse=True)
        self.labels = inverse.view_as(captions)
        self.vectors = embedding[self.used].float()
        self.scale = self.vectors.pow(2).sum(-1).mean()
        # "photo", "flag" ... are in every caption; the other words are the name
        share = torch.stack([(captions == token).any(1).float().mean() for token in self.used])
        self.is_name = share[self.labels] < 0.1
        self.weights = 1 + (name_weight - 1) * self.is_name.float()

    def forward(self, visual: Tensor, countries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of the nearest embedding, relative squared error, share of right tokens."""
        labels = self.labels[countries]
        weights = self.weights[countries]
        weights = weights / weights.mean()
        error = (visual.float() - self.vectors[labels]).pow(2).sum(-1) / self.scale
        closeness = 2 * visual.float() @ self.vectors.T - self.vectors.pow(2).sum(-1)
        logits = closeness * (8 / self.scale)
        surprise = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        right = (logits.argmax(-1) == labels).float().mean()
        return (weights * surprise).mean(), (weights * error).mean(), right


@torch.no_grad()
def evaluate(student: Student, pictures: Pictures, target: CaptionTarget) -> str:
    """Share of countries and caption tokens that are right, on every rendering's plain pictures."""
    student.eval()
    results = []
    for column, name in enumerate((*TRAINED, UNSEEN)):
        countries = pictures.present[:, column].nonzero()[:, 0]
        visual, logits = student(pictures.clean(name, countries))
        _, _, right = target(visual, countries)
        named = (logits.argmax(-1) == countries).float().mean()
        wanted = target.vectors[target.labels[countries]]
        error = (visual - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1)
        of_name, of_rest = (
            error[where].mean() for where in (target.is_name[countries], ~target.is_name[countries])
        )
        results.append(
            f"{name} name {named:.3f} tokens {right:.3f} error {of_name:.3f} {of_rest:.3f}"
        )
    student.train()
    return " | ".join(results)


@torch.no_grad()
def refit(
    student: Student, pictures: Pictures, target: CaptionTarget, batches: int, rng: torch.Generator
) -> None:
    """Solve the projector's last layer by least squares, which Adam approaches only slowly."""
    settings = Augmentation()
    student.eval()
    width = student.projector.linear_2.in_features + 1
    gram = torch.zeros(width, width, dtype=torch.float64)
    moment = torch.zeros(width, student.projector.linear_2.out_features, dtype=torch.float64)
    for _ in range(batches):
        countries = torch.randperm(len(pictures.codes), generator=rng)[:96]
        pixels = pictures.training_batch(countries, settings, rng)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            hidden = student.projector.hidden(student.features(pixels)).float()
        hidden = torch.cat([hidden, torch.ones(*hidden.shape[:2], 1)], -1).flatten(0, 1)
        wanted = target.vectors[target.labels[countries]].flatten(0, 1)
        weighted = hidden * target.weights[countries].flatten()[:, None]
        gram += (weighted.T @ hidden).double()
        moment += (weighted.T @ wanted).double()
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    solution = torch.linalg.solve(gram + ridge, moment).float()
    student.projector.linear_2.weight.copy_(solution[:-1].T)
    student.projector.linear_2.bias.copy_(solution[-1])
    student.train()


def train(arguments: argparse.Namespace, pictures: Pictures, target: CaptionTarget) -> None:
    """The training loop; goes on from its checkpoint where there is one."""
    torch.manual_seed(arguments.seed)
    rng = torch.Generator().manual_seed(arguments.seed)
    student = Student(len(pictures.codes))
    if arguments.start:
        load_average(student, torch.load(arguments.start)["average"])
    if arguments.refit:
        refit(student, pictures, target, arguments.refit, rng)
        print(f"refitted: {evaluate(student, pictures, target)}", flush=True)
    groups, file = decayed(student, arguments.lr, 0.05), arguments.folder / arguments.name
    run = Run(student, groups, file, steps=arguments.steps, follow=0.998)
    if arguments.resume:
        run.resume(rng)
    order = evenly(len(pictures.codes), rng)
    settings = Augmentation(tint=arguments.tint, shades=arguments.shades)
    if run.step >= arguments.steps:
        run.save(rng)
    while run.step < arguments.steps:
        countries = torch.tensor(list(islice(order, arguments.batch)))
        pixels = pictures.training_batch(countries, settings, rng)
        # on a CPU the fused attention's backward pass is four times slower than plain products
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            visual, logits = student(pixels)
        tokens, error, right = target(visual, countries)
        naming = F.cross_entropy(logits.float(), countries, label_smoothing=0.05)
        run.learn(naming + tokens + arguments.error_weight * error)
        if run.step % 25 == 0:
            run.report(naming=naming, tokens=tokens, error=error, right=right)
        if run.step % 200 == 0 or run.step == arguments.steps:
            run.save(rng)
            averaged = Student(len(pictures.codes))
            load_average(averaged, run.average.average)
            print(f"{run.step} {evaluate(averaged, pictures, target)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--error-weight", type=float, default=2.0)
    parser.add_argument("--name-weight", type=float, default=1.0, help="weight of the name's words")
    parser.add_argument("--start", type=Path, help="a checkpoint to begin with")
    parser.add_argument("--refit", type=int, default=0, help="batches for least squares, first")
    parser.add_argument("--name", default="stage_a.pt", help="the checkpoint's file name")
    parser.add_argument("--tint", type=float, default=Augmentation.tint)
    parser.add_argument("--shades", type=float, default=Augmentation.shades)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    model, tokenizer = load_language_model()
    embedding, captions = model.get_input_embeddings().weight, caption_tokens(tokenizer)
    target = CaptionTarget(embedding, captions, arguments.name_weight)
    del model
    train(arguments, Pictures.load(arguments.folder), target)


if __name__ == "__main__":
    main()
