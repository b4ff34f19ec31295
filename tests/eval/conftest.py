"""Shared by the tests of evaluation. Needs: CPU."""

import pytest

from sgl_blend.harness.models import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    return path
