"""Settings are checked before anything is loaded."""

from __future__ import annotations

import pytest

from vmap_ensemble.archive.settings import Settings, load_settings
from vmap_ensemble.errors import SettingsError
from vmap_ensemble.tasks.images.settings import VisionSettings


@pytest.mark.parametrize(
    ("text", "worker", "message"),
    [
        (None, None, "not in the archive"),
        ("{", None, "expected JSON"),
        ("[]", None, "expected a JSON object, got list"),
        ('{"agregation": "x"}', None, "did you mean 'aggregation'"),
        ('{"aggregation": "x"}', None, "aggregation: .*'majority_vote'"),
        ('{"temperature": 0}', None, "temperature: .*got 0"),
        ('{"threads": 2}', None, "worker's key"),
        ("{}", {"thread": 2}, "did you mean 'threads'"),
        ('{"input_shape": [3, 2]}', None, r"expected \(channels, height, width\)"),
    ],
)
def test_what_is_wrong_is_named(text, worker, message, tmp_path):
    if text is not None:
        (tmp_path / "setup_config.json").write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_settings(tmp_path, VisionSettings, worker)


def test_both_files_make_one_settings(tmp_path):
    (tmp_path / "setup_config.json").write_text('{"top_k": 3}')
    settings = load_settings(tmp_path, Settings, {"threads": 2, "profile": True})
    assert (settings.top_k, settings.threads, settings.temperature) == (3, 2, 1.0)
