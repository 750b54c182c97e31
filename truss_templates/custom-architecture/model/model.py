"""A network of one's own: load() gets the checkpoint's folder and builds it from there."""

import json

import torch
from safetensors.torch import load_file

from loader import fetch_checkpoints


class Classifier(torch.nn.Module):
    """Stands for yours: two layers, as wide as config.json says."""

    def __init__(self, inputs, hidden, labels):
        super().__init__()
        self.hidden = torch.nn.Linear(inputs, hidden)
        self.out = torch.nn.Linear(hidden, labels)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)))


class Model:
    """Answers ``{"inputs": [[…], …]}`` with the label of each row and its probability."""

    def __init__(self, config, secrets, data_dir):
        self._config = config
        self._data_dir = data_dir
        self._secrets = secrets
        self._labels = []
        self._model = None

    def load(self):
        # One folder for each checkpoint. Whole or an error; a second call finds what is there.
        (folder,) = fetch_checkpoints(self._config, self._secrets, self._data_dir)
        shape = json.loads((folder / "config.json").read_text())
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = Classifier(shape["inputs"], shape["hidden"], len(shape["labels"]))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        self._labels = shape["labels"]
        self._model = model.to(device).eval()

    @torch.inference_mode()
    def predict(self, request):
        device = next(self._model.parameters()).device
        rows = torch.tensor(request["inputs"], dtype=torch.float32, device=device)
        chances = torch.softmax(self._model(rows), dim=-1)
        best = chances.max(dim=-1)
        return {
            "labels": [self._labels[i] for i in best.indices.tolist()],
            "probabilities": best.values.tolist(),
        }
