"""The flex backend: a second opinion on every kind of list."""

import pytest
import torch

from ziggurat.kernels.attend import attend
from ziggurat.kernels.cases import Case, build

LISTS = ["all", "none", "single", "random", "shared", "per_batch", "some_all", "masked", "unread", "joined"]
CASES = [
    *(Case(lists=name) for name in LISTS),
    *(Case(lists="masked", tokens=tokens, head_dim=48, block=64, tile=128) for tokens in (1, 211)),
    *(Case(lists=name, layout="shuffled", keys=77) for name in ("all", "random", "masked")),
    *(Case(lists=name, layout="gaps", keys=301) for name in ("random", "some_all")),
    Case(lists="random", masked_keys=1.0),
    Case(lists="one_level", factors=(1, 2, 4, 8), masked_keys=0.3, layout="strided"),
    Case(lists="overlapping", factors=(1, 16, 256), tokens=301),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_flex_agrees_with_the_reference(case, dtype):
    problem = build(case, dtype)
    pyramid = problem.pyramid()
    wanted = attend(problem.query, pyramid, problem.blocks, backend="reference")
    got = attend(problem.query, pyramid, problem.blocks, backend="flex")
    for one, two in zip(got, wanted, strict=True):
        assert one.dtype == two.dtype
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)


def test_flex_says_that_it_has_no_backward():
    problem = build(Case(lists="random"), torch.float32)
    query = problem.query.requires_grad_()
    with pytest.raises(ValueError, match="no backward: use backend='torch'"):
        attend(query, problem.pyramid(), problem.blocks, backend="flex")
    with torch.no_grad():
        assert torch.isfinite(attend(query, problem.pyramid(), problem.blocks, backend="flex")[0]).all()
