"""What an application's arguments say, and what they can't."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray")

from vmap_ensemble.errors import SettingsError
from vmap_ensemble.frontends.ray_serve import app
from vmap_ensemble.frontends.ray_serve.settings import MOST_BYTES, ModelSettings, read_application


def test_a_command_line_names_one_archive():
    read = read_application({"archive": "a.mar", "batch_size": "16", "max_request_bytes": "1000"})
    assert read.models == {"ens": ModelSettings(archive="a.mar", batch_size=16)}
    assert read.max_request_bytes == 1000
    assert list(read_application({"archive": "a.mar", "name": "cls/2.0"}).models) == ["cls/2.0"]


def test_several_archives():
    read = read_application(
        {"models": {"ens": {"archive": "a.mar"}, "ens/2.0": {"archive": "b", "settings": {"top_k": 1}}}}
    )
    assert read.models["ens/2.0"] == ModelSettings(archive="b", settings={"top_k": 1})
    assert read.max_request_bytes == MOST_BYTES


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({}, "archive: Field required"),
        ({"archive": "a", "batchsize": 3}, "did you mean 'batch_size'"),
        ({"archive": "a", "batch_size": 0}, "greater than or equal to 1"),
        ({"archive": "a", "batch_wait_s": -1}, "greater than or equal to 0"),
        ({"archive": "a", "max_request_bytes": "many"}, "max_request_bytes"),
        ({"models": {}}, "at least one archive"),
        ({"models": {"a": {"archive": "x"}, "b": {"archive": "x"}}, "invocations": True}, "expected one archive"),
        ({"models": {"ens": "a.mar"}}, "expected an object with 'archive', got str"),
        ({"models": {"a b": {"archive": "x"}}}, "'a b': expected letters"),
        ({"models": {"a/1/2": {"archive": "x"}}}, "'a/1/2': expected letters"),
        ({"models": {"a/1": {"archive": "x"}, "a-1": {"archive": "x"}}}, "the deployment 'a-1'"),
    ],
)
def test_wrong_arguments_say_so(args, told):
    with pytest.raises(SettingsError, match=told):
        app(args)


def test_a_user_config_replaces_what_it_names():
    model = ModelSettings(archive="a.mar", batch_size=16, settings={"top_k": 1})
    assert model.changed({}) == model
    assert model.changed({"batch_wait_s": 0.1}) == ModelSettings(
        archive="a.mar", batch_size=16, batch_wait_s=0.1, settings={"top_k": 1}
    )
    with pytest.raises(SettingsError, match="user_config: unknown key 'replicas'"):
        model.changed({"replicas": 2})


def test_a_batch_can_gather_while_another_is_run():
    deployment = app({"archive": "a.mar", "batch_size": 16})._bound_deployment
    assert (deployment.name, deployment.max_ongoing_requests) == ("ens", 32)


def test_the_file_that_is_shipped_is_rays_and_ours():
    from ray.serve.schema import ServeDeploySchema

    path = Path(__file__).resolve().parents[4] / "config" / "ray_serve.yaml"
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert config.http_options.host == "127.0.0.1"
    (application,) = config.applications
    (model,) = read_application(application.args).models.values()
    (deployment,) = application.deployments
    assert model.batch_size <= deployment.autoscaling_config["target_ongoing_requests"] < 2 * model.batch_size
