"""Contributions, the lens, logit attribution and estimates draw the numbers that they hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmlens.analyses.attention_contribution import AttentionContribution
from mmlens.analyses.attribution_patching import AttributionPatching
from mmlens.analyses.direct_logit_attribution import DirectLogitAttribution
from mmlens.analyses.logit_lens import LogitLens


class TestContributions:
    def make(self, per_head: bool = False) -> AttentionContribution:
        heads = (3,) if per_head else ()
        return AttentionContribution(
            values=torch.rand(4, *heads, 2, 7),
            layers=(0, 1, 2, 5),
            source=tuple(range(3, 10)),
            destination=(11, 12),
            source_labels=(*(f"<img {i // 3},{i % 3}>" for i in range(6)), " of"),
            destination_labels=(" this", " country"),
            source_patches=(*((0, 0, i // 3, i % 3) for i in range(6)), (-1, -1, -1, -1)),
            grids=(((2, 3),),),
        )

    @pytest.mark.parametrize("per_head", [False, True])
    def test_the_numbers_are_the_means(self, seed: int, per_head: bool) -> None:
        contribution = self.make(per_head)
        over = (1, 2) if per_head else (1,)
        figure = contribution.plot()
        means = contribution.values.mean(dim=over)
        folded, _, each = (trace.z for trace in figure.data)
        assert torch.allclose(torch.tensor(each), means.T)
        assert torch.allclose(torch.tensor(folded)[0], means[:, :6].sum(dim=1))
        assert torch.equal(torch.tensor(folded)[1], means[:, 6])
        assert list(figure.data[0].x) == [0, 1, 2, 5]

    def test_patches_alone_are_shown_by_row(self, seed: int) -> None:
        contribution = self.make()
        only = replace(
            contribution,
            values=contribution.values[..., :6],
            source=contribution.source[:6],
            source_labels=contribution.source_labels[:6],
            source_patches=contribution.source_patches[:6],
        )
        figure = only.plot()
        assert [trace.visible for trace in figure.data] == [False, True, False]


class TestReadings:
    """The lens, logit attribution and estimates draw themselves."""

    def test_the_lens(self, seed: int) -> None:
        log_probs = torch.randn(3, 5, 2).log_softmax(dim=0)
        lens = LogitLens(
            log_probs=log_probs,
            ranks=torch.zeros(3, 5, 2, dtype=torch.long),
            top_tokens=torch.randint(0, 4, (3, 5, 3)),
            top_log_probs=torch.zeros(3, 5, 3),
            layers=(0, 1, 2),
            positions=tuple(range(5)),
            labels=("<img 0,0>", "<img 0,1>", " a", " b", " c"),
            tokens=(0, 3),
            names={str(i): f" word{i}" for i in range(4)},
        )
        figure = lens.plot()
        each = [trace for trace in figure.data if len(trace.z) == 5]
        for token, panel in enumerate(each):
            assert torch.allclose(torch.tensor(panel.z), log_probs[..., token].exp().T)
        best = lens.names[str(int(lens.top_tokens[2, 4, 0]))].strip()
        assert f"says: {best}" in each[0].customdata[4][2]

    @pytest.mark.parametrize("per_head", [False, True])
    def test_what_is_added_to_a_logit(self, seed: int, per_head: bool) -> None:
        kinds = ("head_0", "head_1", "mlp_out") if per_head else ("attn_out", "mlp_out")
        names = ("embed", *(f"{layer}.{kind}" for layer in range(3) for kind in kinds), "bias")
        attribution = DirectLogitAttribution(
            values=torch.randn(len(names), 2),
            logits=torch.randn(2),
            components=names,
            positions=(7, 8),
            labels=(" a", " b"),
            token=" Rome",
            contrast=" Paris",
        )
        figure = attribution.plot()
        value = attribution.values[names.index("2.mlp_out"), 1]
        panel = figure.data[0 if per_head else 1]
        assert torch.isclose(torch.tensor(panel.z[-1][2]), value)
        assert "Rome" in figure.layout.title.text and "Paris" in figure.layout.title.text

    def test_estimates(self, seed: int) -> None:
        estimate = AttributionPatching(
            indirect_effect=torch.randn(2, 4, 3),
            clean=0.7,
            corrupted=0.1,
            sites=("attn_out", "mlp_out"),
            layers=(0, 1, 2),
            groups=((5,), (6,), (7,), (8,)),
            group_labels=(" a", " b", " c", " d"),
            answer=" Rome",
            answer_tokens=(3,),
        )
        figure = estimate.plot()
        assert torch.equal(torch.tensor(figure.data[1].z), estimate.indirect_effect[1])
