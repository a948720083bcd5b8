"""The peers by name. Importing this imports none of the peers' packages."""

from __future__ import annotations

from accel.bench.peers.accel_peer import AccelPeer, TorchBundlePeer
from accel.bench.peers.base import Peer, Unsupported
from accel.bench.peers.ctranslate2_peer import CTranslate2
from accel.bench.peers.genai import Genai
from accel.bench.peers.openvino_peer import OpenVINO
from accel.bench.peers.optimum_onnx import Optimum, OrtO2
from accel.bench.peers.ort_dynamo import OrtDynamo, OrtDynamoValues
from accel.bench.peers.sentence_transformers_peer import (
    SentenceTransformersOnnx,
    SentenceTransformersOnnxO2,
    SentenceTransformersTorch,
)
from accel.bench.peers.torch_eager import TorchEager
from accel.bench.peers.transformers_onnx import TransformersOnnx

PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        AccelPeer,
        TorchBundlePeer,
        TorchEager,
        OrtDynamo,
        OrtDynamoValues,
        OrtO2,
        Optimum,
        TransformersOnnx,
        Genai,
        OpenVINO,
        CTranslate2,
        SentenceTransformersTorch,
        SentenceTransformersOnnx,
        SentenceTransformersOnnxO2,
    )
}

__all__ = ["PEERS", "Peer", "Unsupported"]
