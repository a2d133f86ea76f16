"""What the rules know about runtimes, as data. Measured where `tests/unit/test_compatibility_real.py` says so.

Where a version is not in a table the next lower one counts: too little is promised rather than too much.
"""

from __future__ import annotations

from collections.abc import Mapping

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
WEBGPU = "WebGpuExecutionProvider"

ENGINE_RUNTIMES = ("tensorrt", "tensorrt-rtx")

RUNTIME_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
    "onnxruntime-genai": ("onnxruntime-genai", "onnxruntime-genai-cuda"),
    "tensorrt": ("tensorrt", "tensorrt-lean"),
    "tensorrt-rtx": ("tensorrt-rtx",),
}
"""Runtime of a manifest -> what devices report that brings it."""

ONNXRUNTIME_READS: Mapping[tuple[int, int], tuple[int, int]] = {
    (1, 14): (18, 8),
    (1, 15): (19, 8),
    (1, 17): (20, 9),
    (1, 18): (21, 10),
    (1, 20): (21, 10),
    (1, 22): (22, 10),
    (1, 23): (23, 11),
    (1, 32): (26, 13),
}
"""ONNX Runtime's version -> newest operator set of ai.onnx and newest IR version that it is trusted to read.

1.20, 1.22 and 1.23 are what they accept at most; 1.32 accepts sets up to 28 and IR 14, of which the last are drafts.
"""

OTHER_DOMAINS: Mapping[str, Mapping[tuple[int, int], int]] = {
    "ai.onnx.ml": {(1, 14): 4, (1, 32): 5},
    "com.microsoft": {(1, 14): 1},
    "com.microsoft.nchwc": {(1, 14): 1},
}
"""Operator domains besides ai.onnx that ONNX Runtime brings along: its version -> the newest that it reads."""

_CPU_SINCE_1_20 = (
    *("Attention", "AttnLSTM", "BeamSearch", "BiasGelu", "BifurcationDetector", "CDist", "CropAndResize"),
    *("ConvTransposeWithDynamicPads", "DecoderMaskedMultiHeadAttention", "DequantizeLinear", "DynamicQuantizeLSTM"),
    *("DynamicQuantizeMatMul", "DynamicTimeWarping", "EmbedLayerNormalization", "ExpandDims", "FastGelu", "FusedConv"),
    *("FusedGemm", "FusedMatMul", "GatherBlockQuantized", "GatherND", "Gelu", "GreedySearch", "GridSample"),
    *("GroupQueryAttention", "Inverse", "MatMulBnb4", "MatMulFpQ4", "MatMulInteger16", "MatMulIntegerToFloat"),
    *("MatMulNBits", "MaxpoolWithMask", "MultiHeadAttention", "MurmurHash3", "NGramRepeatBlock", "NhwcMaxPool", "Pad"),
    *("QAttention", "QEmbedLayerNormalization", "QGemm", "QLinearAdd", "QLinearAveragePool", "QLinearConcat"),
    *("QLinearConv", "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearMul", "QLinearSigmoid", "QLinearSoftmax"),
    *("QLinearWhere", "QuantizeLinear", "QuickGelu", "Range", "RotaryEmbedding", "SampleOp", "Sampling"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SparseAttention", "SparseToDenseMatMul"),
    *("Tokenizer", "TransposeMatMul", "Trilu", "UnfoldTensor", "Unique", "WhisperBeamSearch", "WordConvEmbedding"),
)
_CUDA_TOO = (
    *("Attention", "BiasGelu", "EmbedLayerNormalization", "FastGelu", "FusedConv", "FusedMatMul", "Gelu"),
    *("GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "QuickGelu", "RotaryEmbedding"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
)
_Since = Mapping[str, tuple[int, int]]

CONTRIB_OPERATORS: Mapping[str, _Since] = {
    **{f"com.microsoft.{name}": {CPU: (1, 20)} for name in _CPU_SINCE_1_20},
    **{f"com.microsoft.{name}": {CPU: (1, 20), CUDA: (1, 20)} for name in _CUDA_TOO},
    **{f"com.microsoft.{name}": {CPU: (1, 23), CUDA: (1, 23)} for name in ("MoE", "QMoE")},
    **{
        f"com.microsoft.{name}": {CUDA: (1, 20)} for name in ("GroupNorm", "SkipGroupNorm", "BiasSplitGelu", "NhwcConv")
    },
    "com.microsoft.GroupQueryAttention[position_ids]": {CPU: (1, 22)},
    "com.microsoft.GroupQueryAttention[attention_bias]": {CPU: (1, 22)},
    "com.microsoft.GroupQueryAttention[head_sink]": {CPU: (1, 23), CUDA: (1, 23)},
    "com.microsoft.GroupQueryAttention[qk_norm]": {CUDA: (1, 32), WEBGPU: (1, 32)},
    "com.microsoft.GroupQueryAttention[quantised_kv]": {CUDA: (1, 32)},
}
"""Operator outside ONNX -> the execution providers that implement it, each with the lowest version known to.

A name in brackets is a use of the operator that only some providers implement.
"""

RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT-RTX loads engines on; it refused an H100 (9.0) with just this list."""

RTX_OWN_ENGINE = ("7.5",)
"""Served by TensorRT-RTX, but only with an engine for nothing else."""

JETPACK_CAPABILITIES = ("5.3", "6.2", "7.2", "8.7", "11.0")
"""Boards whose TensorRT comes with the JetPack and from nowhere else."""

JETPACK_TENSORRT: Mapping[str, str] = {
    "5.1": "8.5",
    "6.0": "8.6",
    "6.1": "10.3",
    "6.2": "10.3",
    "7.0": "10.13",
    "7.1": "10.13",
}
"""JetPack -> the TensorRT that it ships."""

TENSORRT_CAPABILITIES: Mapping[int, tuple[str, ...]] = {
    8: ("6.0", "6.1", "7.0", "7.5", "8.0", "8.6", "8.7", "8.9", "9.0"),
    10: ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "11.0", "12.0"),
    11: ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"),
}
"""Major version of classic TensorRT -> compute capabilities it has kernels for."""

PARSER_OPSETS: Mapping[tuple[str, int], int] = {
    ("tensorrt", 8): 17,
    ("tensorrt", 10): 20,
    ("tensorrt", 11): 22,
    ("tensorrt-rtx", 1): 22,
}
"""Builder and major version -> newest operator set that its ONNX parser is trusted to take."""

FORMAT_CAPABILITIES: Mapping[str, tuple[float, float]] = {
    "fp8": (8.9, 99.0),
    "fp4": (12.0, 12.9),
    "bf16": (8.0, 99.0),
}
"""Number format -> lowest and highest compute capability whose kernels compute with it; others are everywhere."""

FORMAT_EXCEPTIONS = (("bf16", "8.7"),)
"""Format and capability that the range above holds and that is not served: Orin computes fp16, int8 and int4."""

CUDA13_MIN_DRIVER = 580
"""Lowest driver (major) for what is built against CUDA 13."""

CUDA13_RUNTIMES: Mapping[str, tuple[int, int]] = {"tensorrt-rtx": (1, 2), "onnxruntime-gpu": (1, 24)}
"""Runtime -> version from which its public package is built against CUDA 13."""
