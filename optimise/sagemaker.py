"""Turns an archive into the model.tar.gz of AWS's SageMaker images for Ray Serve, to be unpacked to /opt/ml/model.

    config.yaml             Ray Serve's file, which the image runs
    deployment.py           the application that it names: the front end of this project
    code/requirements.txt   what the image lacks; installed when a container starts
    code/vmap_ensemble      this project; code/ is on the image's path
    model                   the archive, unpacked

Source: scripts/docker/ray/sagemaker_entrypoint.sh and sagemaker_serve.py of aws/deep-learning-containers, 2026-08.
"""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import vmap_ensemble
from vmap_ensemble.archive.unpack import unpacked
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.models.transformers import PRETRAINED_FOLDER
from vmap_ensemble.process.files import written_whole

DEPLOYMENT = '''\
"""The application of config.yaml: an archive behind Ray Serve, which lies beside this file."""

from pathlib import Path

from vmap_ensemble.frontends import ray_serve


def app(args):
    return ray_serve.app({"archive": str(Path(__file__).with_name("model")), "invocations": True, **args})
'''
# Beside what the images hold: torch, torchvision, Pillow, NumPy, PyYAML, transformers, and Ray with FastAPI.
REQUIREMENTS = ("safetensors>=0.5", "psutil>=5.9.6", "rich>=13")
EXPLANATIONS = "captum>=0.8"
# Of a deployment of Ray's.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Weights hardly get smaller, whatever the effort.
EFFORT = 1


@dataclass(frozen=True)
class Deployment:
    """How the archive is served.

    Attributes:
        name: The model's; letters and digits.
        batch_size: Requests that share one forward, at most.
        cpus: Of a replica: torch's threads.
        gpus: Of a replica.
    """

    name: str
    batch_size: int = 8
    cpus: int = 1
    gpus: int = 0


def write_model(archive: Path, target: Path, deployment: Deployment) -> int:
    """Write the file, whole or not at all.

    Args:
        archive: A .mar, or the folder that one was unpacked into.
        target: Such as model.tar.gz.
        deployment: What config.yaml says.

    Returns:
        Bytes of the file.

    Raises:
        EnsembleError: It is no archive, or its name can't be a deployment's.
    """
    if not NAME.fullmatch(deployment.name):
        raise EnsembleError(f"{archive.name}: expected a name of letters, digits, '_', '.' and '-', as Ray's are")
    package = Path(vmap_ensemble.__file__).parent
    with unpacked(archive) as folder, written_whole(target) as scratch:
        explains = (folder / PRETRAINED_FOLDER).is_dir()
        with tarfile.open(scratch, "w:gz", compresslevel=EFFORT) as tar:
            _add_text(tar, "config.yaml", _config(deployment))
            _add_text(tar, "deployment.py", DEPLOYMENT)
            wanted = (*REQUIREMENTS, EXPLANATIONS) if explains else REQUIREMENTS
            _add_text(tar, "code/requirements.txt", "".join(f"{line}\n" for line in wanted))
            tar.add(package, f"code/{package.name}", filter=_without_caches)
            tar.add(folder, "model", filter=_without_caches)
    return target.stat().st_size


def _config(deployment: Deployment) -> str:
    """Ray Serve's file, for one application at `/`."""
    args = {"name": deployment.name, "batch_size": deployment.batch_size}
    resources: dict[str, Any] = {"num_cpus": deployment.cpus, "num_gpus": deployment.gpus}
    application = {
        "name": deployment.name,
        "route_prefix": "/",
        "import_path": "deployment:app",
        "args": args,
        "deployments": [{"name": deployment.name, "num_replicas": 1, "ray_actor_options": resources}],
    }
    return yaml.safe_dump({"applications": [application]}, sort_keys=False)


def _add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(text.encode())
    tar.addfile(info, io.BytesIO(text.encode()))


def _without_caches(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return None if "__pycache__" in info.name else info
