import pytest


@pytest.fixture(autouse=True)
def own_artifacts(tmp_path, monkeypatch):
  """Each test compiles for itself: bundles of two tests are often the same."""
  monkeypatch.setenv("FAIR_DATA_DIR", str(tmp_path.with_name(f"{tmp_path.name}-data")))
