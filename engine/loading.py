"""From a checkpoint folder to a model ready to run:  open_checkpoint -> model_facts -> (resolve) -> load_model.

Headers are read first, so that a checkpoint that cannot be served, or does not fit, is refused before a weight is
touched. Weights are then taken layer by layer from the memory-mapped files; what a layer read is dropped once its
kernels have repacked it, so the model never exists twice.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

import kernels.activation
import kernels.attention.registry
import kernels.linear.registry
import kernels.norm
import kernels.rope
from engine.calibration.fingerprint import fingerprint
from engine.checkpoint.errors import TensorError
from engine.checkpoint.format import Format, detect
from engine.checkpoint.gguf import Gguf
from engine.checkpoint.gguf_choice import SUFFIX
from engine.checkpoint.gguf_file import read_headers
from engine.checkpoint.gguf_source import GgufSource
from engine.checkpoint.quip import Quip
from engine.checkpoint.source import Progress, Source
from engine.config import EngineConfig, ModelFacts, Plan
from engine.machine import free_memory, has_cuda, num_cores
from engine.messages import KernelUse
from engine.models import llama
from engine.models.config import ModelConfig, read_json
from engine.models.decoder import Decoder
from engine.models.gguf import describe as describe_gguf
from engine.models.layers import BoundTerm, Embedding, FusedProjections, Linear, Projections, RMSNorm, Rope
from engine.models.registry import ModelDescription, describe
from engine.sampling import Sampler, sampler_for
from kernels.attention.quantized.cache import QuantizedKernel, QuantizedSpec
from kernels.contract import (
    ActivationKernel,
    AttentionKernel,
    AttentionSpec,
    Choice,
    KernelT,
    LinearSpec,
    RowSpec,
    select,
)
from kernels.gpu.packing import Packed
from kernels.gpu.transforms import on_gpu
from kernels.linear.affine.quantize import quantize_symmetric
from kernels.linear.dense.layout import DenseWeights
from kernels.linear.joined import RoundingKernel
from kernels.linear.rounding import Rounding
from kernels.linear.transforms import Transform
from kernels.linear.weights import LinearWeights, Term
from kvcache.calibration import FILE_NAME, CalibrationError, read_calibration
from kvcache.layout import PageLayout
from kvcache.policy import Policy, PolicyError, read_policy
from kvcache.storage import page_dtype

ROUNDED = "activations rounded to 8 bits where they meet quantized weights; --activations float keeps them"
HEAD_GROUP = 32  # channels that share a scale of a rounded output head: 8.5 bits a weight
ACTIVATION_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}  # by device

FREQUENCIES = "rope_freqs.weight"

TensorsT = TypeVar("TensorsT")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers are read and whose model and format are known to be supported."""

    path: Path  # the folder, or a GGUF file in place of one
    folder: Path
    description: ModelDescription
    source: Source
    format: Format

    @property
    def config(self) -> ModelConfig:
        return self.description.config


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what the start screen says about it."""

    model: Decoder
    sampler: Sampler
    kernels: list[KernelUse]  # equal layers counted
    weight_bytes: int  # of the checkpoint
    device: str
    dtype: str  # of the activations
    notes: tuple[str, ...]  # what was changed at load
    layout: PageLayout  # of the cache that the attention kernels were chosen for


def open_checkpoint(folder: Path, on_progress: Progress | None = None) -> Checkpoint:
    """Read config.json and the tensors' headers, or the header of a GGUF file in place of a folder. `on_progress` hears
    (bytes read, bytes in all) while weights load.

    Raises UnsupportedModel or CheckpointError (both ValueError) naming what cannot be served.
    """
    if folder.suffix == SUFFIX:
        return _open_gguf(folder, on_progress)
    description = describe(folder)
    source = Source(folder, on_progress)
    return Checkpoint(folder, folder, description, source, detect(read_json(folder), source))


def _open_gguf(path: Path, on_progress: Progress | None) -> Checkpoint:
    headers = read_headers(path)
    source = GgufSource(headers, on_progress)
    shapes = {name: stored.shape for header in headers for name, stored in header.tensors.items()}
    factors = tuple(source.tensor(FREQUENCIES).float().flatten().tolist()) if FREQUENCIES in source else ()
    description = describe_gguf(headers[0].settings, shapes, factors)
    config = description.config
    turned = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if description.architecture is llama else {}
    return Checkpoint(path, source.folder, description, source, Gguf(source.block_types(), turned))


def page_layout(checkpoint: Checkpoint, kv_policy: str, page_size: int, artifact: str | None = None) -> PageLayout:
    """What a page of the cache holds, with the calibration that the policy asks for: the file `artifact`, or else the
    one beside the checkpoint. The checkpoint must not be closed yet.

    Raises PolicyError when the policy is not known or cannot serve the model, and CalibrationError when the artifact
    cannot: damaged, or made for another model or policy.
    """
    policy, config = read_policy(kv_policy), checkpoint.config
    sizes = (config.num_layers, config.num_kv_heads, config.head_dim, page_size)
    path = _artifact_path(checkpoint, policy, artifact)
    if path is None:
        return PageLayout(policy, *sizes)
    calibration = read_calibration(path, fingerprint(config, checkpoint.source))
    try:
        return PageLayout(policy, *sizes, calibration)
    except CalibrationError as error:
        raise CalibrationError(f"KV cache policy {policy} and {path}: {error}") from error


def _artifact_path(checkpoint: Checkpoint, policy: Policy, named: str | None) -> Path | None:
    """The artifact to use, if any."""
    if named is None:
        beside = checkpoint.folder / FILE_NAME
        return beside if policy.is_calibrated and beside.exists() else None
    if not policy.is_calibrated:
        raise PolicyError(
            f"KV cache policy {policy} uses no calibration, and --kv-calibration names {named}: leave it out, or use a "
            "policy such as skvq:k2v2"
        )
    return Path(named)


def model_facts(checkpoint: Checkpoint, config: EngineConfig) -> ModelFacts:
    """What `resolve` must know before a weight is read. Raises PolicyError when the cache policy is not known or cannot
    serve the model."""
    layout = page_layout(checkpoint, config.kv_policy, config.page_size, config.kv_calibration)
    on_cuda = config.device == "cuda" and has_cuda()
    return ModelFacts(
        max_position=checkpoint.config.context_len,
        kv_bytes_per_token=-(-layout.bytes_per_page // config.page_size),
        weight_bytes=checkpoint.source.total_bytes,
        free_memory=torch.cuda.mem_get_info()[0] if on_cuda else free_memory(),
        free_host_memory=free_memory() if on_cuda else None,
        num_cores=num_cores(),
        has_cuda=has_cuda(),
        bytes_per_recent_page=layout.bytes_per_recent_page,
        recent_pages_per_sequence=0 if layout.read_rule is None else layout.read_rule.max_pages,
        recent_pages_per_request=layout.rule_of(config.kv_request_window).max_pages if config.kv_request_window else 0,
        window=layout.policy.window if layout.policy.is_quantized else None,
    )


def load_model(checkpoint: Checkpoint, plan: Plan) -> LoadedModel:
    """Read the weights and bind every layer to a kernel.

    Raises TensorError naming a tensor that is missing, left over or of another shape than config.json says, and
    KernelRefused when `plan.kernel` insists on a back end that cannot serve a layer.
    """
    parts = CheckpointParts(checkpoint, plan)
    model = checkpoint.description.architecture.build(checkpoint.config, parts)
    checkpoint.source.check_all_read()
    checkpoint.source.close()
    return LoadedModel(
        model=model,
        sampler=parts.sampler(checkpoint.config),
        kernels=parts.chosen(),
        notes=tuple(parts.notes),
        weight_bytes=checkpoint.source.total_bytes,
        device=plan.device,
        dtype=str(parts.dtype).removeprefix("torch."),
        layout=parts.layout,
    )


class CheckpointParts:
    """The layers of a checkpoint, by name: engine.models.layers.Parts."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self._source = checkpoint.source
        self._format = checkpoint.format
        self._plan = plan
        self.layout = page_layout(checkpoint, plan.kv_policy, plan.page_size, plan.kv_calibration)
        self._device = torch.device(plan.device)
        self.dtype = ACTIVATION_DTYPES[plan.device]
        self._chosen: Counter[tuple[str, str, str]] = Counter()  # (what, kernel, refusals) -> layers
        self._bytes: Counter[tuple[str, str, str]] = Counter()  # likewise -> bytes of weights
        self.notes: list[str] = []

    def linear(self, name: str, shape: tuple[int, int], bias: bool) -> Linear:
        """Raises TensorError when the layer's shape or bias is not what the model expects."""
        return self._bind(name, self._format.linear(self._source, name, shape, bias))

    def projections(self, layers: Sequence[tuple[str, tuple[int, int]]], bias: bool) -> Projections | FusedProjections:
        """Raises TensorError likewise."""
        fused = self._format.fused(self._source, layers, bias) if isinstance(self._format, Quip) else None
        if fused is not None:
            return FusedProjections(self._bind(fused.name, fused.weights), fused.outputs)
        return Projections([self.linear(name, shape, bias) for name, shape in layers])

    def norm(self, name: str, width: int, eps: float) -> RMSNorm:
        weight = self._source.take(f"{name}.weight", (width,))
        spec = RowSpec(width, self._device, self.dtype)
        return RMSNorm(self._choose_row_op("norm", kernels.norm.KERNELS, spec), self._activation(weight), eps)

    def embedding_and_head(self, embedding: str, head: str, config: ModelConfig) -> tuple[Embedding, Linear]:
        """One matrix under either name serves both when the configuration ties them; two are used as they are."""
        shape = (config.vocab_size, config.hidden_size)
        has_embedding, has_head = self._has(embedding), self._has(head)
        if config.tied_head and has_head and not has_embedding:
            embedding = head
        if config.tied_head and has_embedding and not has_head:
            head = embedding
        rows, weights = self._embedding_rows(embedding, shape)
        if weights is None or head != embedding:
            weights = self._format.linear(self._source, head, shape, False)
        return Embedding(rows, self.dtype), self._bind(head, self._rounded_head(head, weights))

    def _embedding_rows(
        self, name: str, shape: tuple[int, int]
    ) -> tuple[Callable[[Tensor], Tensor], LinearWeights | None]:
        """The lookup, and what a head that is the same matrix multiplies by where that is nothing to be read anew."""
        if isinstance(self._format, Gguf):
            return self._format.rows(self._source, name, shape, (self._device, self.dtype)), None
        weight = self._to_device(self._source.take(f"{name}.weight", shape))  # [vocab_size, hidden_size]
        return lambda ids: weight.index_select(0, ids), LinearWeights((DenseWeights(weight),))

    def rope(self, config: ModelConfig) -> Rope:
        spec = RowSpec(config.head_dim, self._device, self.dtype)
        return Rope(self._choose_row_op("rope", kernels.rope.KERNELS, spec), config.rope, self._device)

    def attention_kernel(self, config: ModelConfig, layer: int) -> AttentionKernel | QuantizedKernel:
        policy, heads = self.layout.layers[layer], (config.num_heads, config.num_kv_heads)
        spec: AttentionSpec | QuantizedSpec
        if policy.is_quantized:
            codec, spec = "quantized", QuantizedSpec(*heads, self.layout.chunk(policy), self._device, self.dtype)
        else:
            sizes = (config.head_dim, self._plan.page_size)
            codec, spec = "f16", AttentionSpec(*heads, *sizes, self._device, self.dtype, page_dtype(policy))
        candidates, insisted = kernels.attention.registry.kernels_for(codec), self._plan.kernel
        if insisted is not None and all(kernel.name != insisted for kernel in candidates):
            insisted = insisted.partition("-")[0]  # variants are of products: attention runs on their back end
        kernel: AttentionKernel | QuantizedKernel = self._note(
            f"attention {policy.name}", select(candidates, spec, insisted)
        )
        return kernel

    def activation_kernel(self, config: ModelConfig) -> ActivationKernel:
        spec = RowSpec(config.intermediate_size, self._device, self.dtype)
        return self._choose_row_op("swiglu", kernels.activation.KERNELS, spec)

    def sampler(self, config: ModelConfig) -> Sampler:
        sampler, uses = sampler_for(config.vocab_size, self._device, self._plan.kernel)
        for what, choice in uses:
            self._note(what, choice)
        return sampler

    def chosen(self) -> list[KernelUse]:
        """What every layer so far runs on, equal ones counted."""
        return [
            KernelUse(f"{count} x {what}", kernel, refusals, self._bytes[what, kernel, refusals])
            for (what, kernel, refusals), count in self._chosen.items()
        ]

    def _rounded_head(self, name: str, weights: LinearWeights) -> LinearWeights:
        """An output head of floats in 8 bits: beside 4-bit layers it would be half of all that a token reads."""
        (term, *others) = weights.terms
        if self._plan.head_bits != 8 or others or not isinstance(term, DenseWeights):
            return weights
        spec = replace(self._spec(term), detail="8-bit", bits=8, group_size=HEAD_GROUP)
        choice = select(kernels.linear.registry.kernels_for("affine"), spec, self._plan.kernel)
        reason = "; ".join(choice.refusals) if choice.kernel.name == "reference" else ""
        if term.in_features % HEAD_GROUP:
            reason = f"rows of {term.in_features} channels are not whole groups of {HEAD_GROUP}"
        if reason:
            self.notes.append(f"output head kept in {term.bits} bits: {reason}")
            return weights
        self.notes.append(f"output head rounded from {term.bits} to 8 bits; --head-bits 16 keeps it as it is")
        weight = term.weight.cpu()  # an embedding that is the head as well lies on the model's device
        try:
            return replace(weights, terms=(quantize_symmetric(weight, HEAD_GROUP, self._source.drop_pages),))
        except ValueError as error:
            raise TensorError(f"tensor {name + '.weight'!r} cannot be rounded to 8 bits: {error}") from error

    def _bind(self, name: str, weights: LinearWeights) -> Linear:
        """Choose a kernel for every term and let it repack the weights. Raises TensorError naming a damaged layer."""
        bias = None if weights.bias is None else self._activation(weights.bias)
        pre = tuple(self._transform(transform) for transform in weights.pre)
        post = tuple(self._transform(transform) for transform in weights.post)
        rounded = any(isinstance(transform, Rounding) for transform in pre)
        bound = Linear([self._bind_term(name, term, rounded) for term in weights.terms], pre, bias, post)
        self._source.release()
        return bound

    def _bind_term(self, name: str, term: Term, rounded: bool) -> BoundTerm:
        """`rounded`: the checkpoint itself rounds the activations, and a kernel must not do so once more."""
        spec = self._spec(term)
        spec = replace(spec, exact_activations=spec.exact_activations or rounded)
        choice = select(kernels.linear.registry.kernels_for(term.family), spec, self._plan.kernel)
        try:
            prepared = choice.kernel.prepare(self._place(term))
        except ValueError as error:
            raise TensorError(f"the weights of {name!r} cannot be served: {error}") from error
        if isinstance(choice.kernel, RoundingKernel) and ROUNDED not in self.notes:
            self.notes.append(ROUNDED)
        if isinstance(prepared, Packed) and prepared.configs.note not in self.notes:
            self.notes.append(prepared.configs.note)
        return BoundTerm(self._note(f"{term.family} {term.describe()}", choice, prepared.num_bytes), prepared)

    def _transform(self, transform: Transform) -> Transform:
        """Where the model is, in one kernel of a GPU where there is one."""
        placed = self._place(transform)
        return placed if self._plan.kernel == "reference" else on_gpu(placed, self._device, self.dtype)

    def _spec(self, term: Term) -> LinearSpec:
        return LinearSpec(
            in_features=term.in_features,
            out_features=term.out_features,
            device=self._device,
            dtype=self.dtype,
            detail=term.describe(),
            bits=term.bits,
            group_size=term.group_size,
            exact_activations=self._plan.activations == "float",
        )

    def _choose_row_op(self, what: str, candidates: tuple[KernelT, ...], spec: RowSpec) -> KernelT:
        """The user's choice of kernel binds an op on rows only where that back end exists: it names one for weights."""
        insisted = self._plan.kernel if any(kernel.name == self._plan.kernel for kernel in candidates) else None
        return self._note(what, select(candidates, spec, insisted))

    def _note(self, what: str, choice: Choice[KernelT], num_bytes: int = 0) -> KernelT:
        key = (what, choice.kernel.name, "; ".join(choice.refusals))
        self._chosen[key] += 1
        self._bytes[key] += num_bytes
        return choice.kernel

    def _has(self, layer: str) -> bool:
        return any(name.startswith(f"{layer}.") for name in self._source.names())

    def _activation(self, vector: Tensor) -> Tensor:
        return vector.to(self._device, self.dtype)

    def _to_device(self, tensor: Tensor) -> Tensor:
        """One number that stands for all (a stride of 0) goes as one, and stands for all there."""
        if tensor.device.type == self._device.type or 0 not in tensor.stride():
            return tensor.to(self._device)
        once = [slice(1) if stride == 0 else slice(None) for stride in tensor.stride()]
        return tensor[tuple(once)].to(self._device).expand(tensor.shape)

    def _place(self, holder: TensorsT) -> TensorsT:
        """The same frozen dataclass with its tensors on the model's device."""
        values = {field.name: getattr(holder, field.name) for field in fields(cast(Any, holder))}
        moved: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                moved[name] = self._to_device(value)
            elif is_dataclass(value):
                moved[name] = self._place(value)
        return cast(TensorsT, replace(cast(Any, holder), **moved))
