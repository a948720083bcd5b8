"""The peers by name. Importing this imports none of the peers' packages."""

from __future__ import annotations

from accel.bench.peers.accel_peer import (
    AccelOpenVINOBf16,
    AccelPeer,
    AccelW4G32,
    AccelW8A8,
    AccelW8G128,
    TorchBundlePeer,
)
from accel.bench.peers.base import Peer, Unsupported
from accel.bench.peers.ctranslate2_peer import CTranslate2, CTranslate2Int8
from accel.bench.peers.genai import Genai, GenaiInt4, GenaiInt8
from accel.bench.peers.openvino_peer import (
    OpenVINO,
    OpenVINOBf16,
    OpenVINOInt4,
    OpenVINOInt4Bf16,
    OpenVINOInt8,
    OpenVINOInt8Bf16,
    OpenVINOStatic,
    OpenVINOStaticBf16,
)
from accel.bench.peers.optimum_onnx import Optimum, OrtInt8, OrtO2
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
        AccelW8A8,
        AccelW8G128,
        AccelW4G32,
        AccelOpenVINOBf16,
        TorchBundlePeer,
        TorchEager,
        OrtDynamo,
        OrtDynamoValues,
        OrtO2,
        OrtInt8,
        Optimum,
        TransformersOnnx,
        Genai,
        GenaiInt8,
        GenaiInt4,
        OpenVINO,
        OpenVINOBf16,
        OpenVINOInt8,
        OpenVINOInt8Bf16,
        OpenVINOStatic,
        OpenVINOStaticBf16,
        OpenVINOInt4,
        OpenVINOInt4Bf16,
        CTranslate2,
        CTranslate2Int8,
        SentenceTransformersTorch,
        SentenceTransformersOnnx,
        SentenceTransformersOnnxO2,
    )
}

__all__ = ["PEERS", "Peer", "Unsupported"]
