"""What every test gets: shapes checked at run time, no network for models, a fresh seed.

- Signatures of ``mmlens`` are enforced while tests run (jaxtyping's shapes, through beartype): in
  each test at the first calls of every function, for checking them all takes nearly as long as the
  tests. ``MMLENS_TYPECHECK=all`` (as `make test-all` does) checks every call, ``=0`` none, to see
  whether it is the check that fails.
- Nothing is fetched from a model hub.
- ``seed`` is another number on every run, shown when a test fails; ``MMLENS_TEST_SEED=n`` fixes it.
  In CI it follows from the committed `mmlens`: other code is tested with other numbers, the same
  code with the same, so that ``CI=true make test`` says beforehand what CI will say.
"""

import dataclasses
import functools
import gc
import hashlib
import os
import random
import secrets
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[variable] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# What these assert is shown as what a test asserts: with both sides.
pytest.register_assert_rewrite(
    "cell_checks", "checkpoint_checks", "checkpoint_folders", "half_precision", "rounding"
)

TYPECHECK = os.environ.get("MMLENS_TYPECHECK", "first")
CHECKED_CALLS = float("inf") if TYPECHECK == "all" else 2
"""Of each function in each test."""

calls: Counter[int] = Counter()
"""By the code's identity: hashing code takes longer than many a call."""
check_all = jaxtyping.jaxtyped


def check_first_calls(made: Any = None, *, typechecker: Any = None) -> Any:
    """As `jaxtyping.jaxtyped`, but a function's later calls are its own."""
    if made == "context":
        return check_all(made)
    if made is None:
        return functools.partial(check_first_calls, typechecker=typechecker)
    if isinstance(made, type):
        if dataclasses.is_dataclass(made) and "__init__" in vars(made):
            made.__init__ = check_first_calls(made.__init__, typechecker=typechecker)
        return made

    @functools.wraps(made)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[code] += 1
        return (checked() if calls[code] <= CHECKED_CALLS else made)(*args, **kwargs)

    # Of the code: an inner function is made, and would be checked, again and again.
    code = id(made.__code__)
    checked = functools.cache(lambda: check_all(made, typechecker=typechecker))
    return call


@pytest.fixture(autouse=True)
def check_again() -> Iterator[None]:
    """Each test counts calls from 0, and has gradients on at its end, too."""
    calls.clear()
    yield
    on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert on, "gradients are off after the test"


jaxtyping.jaxtyped = check_first_calls

# The hook decorates modules as they are imported, so it comes before anything of mmlens does.
if TYPECHECK != "0":
    # As for mypy, a parameter declared as float may be an int.
    install_import_hook(
        "mmlens", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    )

import numpy as np
import torch

# The models here are small: several threads would mostly wait for each other.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# A first call that loads a model is slow without being wrong, so there is no deadline.
# Examples are drawn anew, also in CI, where hypothesis would choose the same for ever.
hypothesis.settings.register_profile("mmlens", deadline=None, print_blob=True, derandomize=False)
hypothesis.settings.load_profile("mmlens")


@functools.cache
def code_of_ci() -> str | None:
    """What names the committed `mmlens` in CI; None elsewhere, or where git does not say."""
    if not os.environ.get("CI"):
        return None
    asked = ["git", "rev-parse", "HEAD:mmlens"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(asked, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def seed_for(name: str) -> int:
    """A seed that nobody chose, for what has this name."""
    if chosen := os.environ.get("MMLENS_TEST_SEED"):
        return int(chosen)
    if code := code_of_ci():
        digest = hashlib.sha256(f"{code}{name}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1
    return secrets.randbelow(2**31)


if code_of_ci():
    hypothesis.core.global_force_seed = seed_for("hypothesis")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that nobody chose, already given to random, numpy and torch."""
    value = seed_for(request.node.nodeid)
    print(f"to repeat this run: MMLENS_TEST_SEED={value}")  # pytest shows it when the test fails
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def require() -> Callable[[Any, str], None]:
    """``require(found, reason)`` skips the test without ``found``; in CI it fails instead.

    For what a person's machine may lack (a browser, say) and CI must have.
    """

    def check(found: Any, reason: str) -> None:
        if found:
            return
        if os.environ.get("CI"):
            pytest.fail(f"CI must have it: {reason}")
        pytest.skip(reason)

    return check


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collection: going through it takes half a second."""
    gc.collect()
    gc.freeze()
