"""Fixtures that several tests of training share; a module may define its own ``codec`` over these."""

from pathlib import Path

import pytest
import torch

from policies.codec import ScidCodec
from policies.prompt import PromptTokens
from tests.policies.factory import tiny_codec, tiny_tokenizer, write_tiny_policy
from tests.trainer import small_world
from tests.trainer.small_sft import TOKENIZATION
from trainer.tokenization import fit_codec


@pytest.fixture
def one_thread() -> None:
    """Torch on one thread: what is compared or pinned does not depend on the machine's cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def codec() -> ScidCodec:
    """60 items with drawn SCIDs."""
    return tiny_codec(60, (8, 8, 8))


@pytest.fixture(scope="module")
def tokens(codec: ScidCodec) -> PromptTokens:
    """The codec's tokens in a tiny tokenizer."""
    return PromptTokens(tiny_tokenizer(codec), codec)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policies folder with v1, a tiny one, for each test file."""
    folder = tmp_path_factory.mktemp("policies")
    write_tiny_policy(folder / "v1")
    return folder


@pytest.fixture(scope="session")
def codec_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec fitted to the small world; read, never written to."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("codec") / "codec"
    fit_codec(small_world.items(), small_world.histories(), TOKENIZATION, out)
    return out
