"""Clients of a server that answers for an ensemble: HTTP, in turn or async, and gRPC. Needs no torch.

with Client("http://127.0.0.1:8080", "ens") as client:
    print(client.predict(Path("cat.jpg")).label)
"""

from vmap_ensemble.client.answers import Prediction, Refused
from vmap_ensemble.client.http import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "Prediction", "Refused"]
