import pytest

from tests.safety.hostile import Place
from tests.tiny import write_models


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(tmp_path, models, capsys):
    return Place(tmp_path, models, capsys)
