"""All members in one archive and one worker, asked one after another: what people write who have N checkpoints."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier

DIGIT = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])


class Loop(ImageClassifier):
    """The stock handler with a list of modules in place of one."""

    topk = 10

    def initialize(self, context: Any) -> None:
        """Load the archive's checkpoint, which is the first member, and the others beside it."""
        super().initialize(context)
        folder = Path(context.system_properties["model_dir"])
        model_file = self.manifest["model"]["modelFile"]
        others = sorted(folder.glob("other*.pt"))
        loaded = [self._load_pickled_model(str(folder), model_file, str(file)) for file in others]
        self.members = [self.model, *(member.to(self.device).eval() for member in loaded)]
        settings = context.model_yaml_config["handler"]
        torch.set_num_threads(settings["threads"])
        if settings["input"] == "digit":
            self.image_processing = DIGIT

    @torch.inference_mode()
    def inference(self, data: Tensor) -> Tensor:
        """(B, ...) images -> (B, C) mean of the members' probabilities."""
        return torch.stack([member(data).softmax(1) for member in self.members]).mean(0)

    def postprocess(self, data: Tensor) -> list[dict[str, float]]:
        """One {class: probability} per request."""
        return [{str(index): value for index, value in enumerate(row)} for row in data.tolist()]
