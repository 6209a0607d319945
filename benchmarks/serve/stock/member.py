"""One member in an archive of its own: TorchServe's image classifier, which answers all ten probabilities."""

from typing import Any

import torch
from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier

# As in TorchServe's own MNIST example.
DIGIT = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])


class Member(ImageClassifier):
    """The stock handler; the model-config yaml says how many threads it has and what it is sent."""

    topk = 10

    def initialize(self, context: Any) -> None:
        """Load the checkpoint as the stock handler does."""
        super().initialize(context)
        settings = context.model_yaml_config["handler"]
        torch.set_num_threads(settings["threads"])
        if settings["input"] == "digit":
            self.image_processing = DIGIT
