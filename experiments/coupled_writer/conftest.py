"""The tokens that the tests of models use."""

from model.conftest import document, input_ids  # noqa: F401
