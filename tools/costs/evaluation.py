"""One evaluation of an SD3 transformer: parameters, FLOPs of forward and backward, bytes that autograd keeps.

The walk follows diffusers' ``SD3Transformer2DModel`` layer by layer. A gradient reaches only what lies after the first
adapter: the base is frozen, so its layers pass the gradient of their input on (one product, as the forward) and have
none of their own, while an adapter needs both. A multiplication with its addition is two FLOPs; normalisations,
activations and sums, below a hundredth of the whole, are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tools.costs.architecture import TransformerShape

# Gradients of queries, keys, values and weights, and the weights computed again, to the forward's two products.
ATTENTION_BACKWARD = 2.5
_TIME_FEATURES = 256


@dataclass(frozen=True)
class Lora:
    """An adapter: its rank, and the ends of the names of the layers that it is on."""

    rank: int
    targets: tuple[str, ...]

    def covers(self, name: str) -> bool:
        """Whether the linear layer called ``name`` is adapted."""
        return any(name == target or name.endswith(f".{target}") for target in self.targets)


@dataclass
class Cost:
    """Of one evaluation of one picture without guidance; under guidance it is two. FLOPs and bytes.

    ``kept`` are the tensors that the backward pass needs, ``kept_checkpointed`` the most that are there at once when a
    block's are computed again from its input; ``kept_once`` do not grow with the number of pictures (adapter weights in
    half precision).
    """

    parameters: int = 0  # of the frozen base
    largest_block: int = 0  # parameters of it
    buffers: int = 0  # values that are no parameters: the table of positions
    lora_parameters: int = 0
    lora_layers: int = 0
    adapted_parameters: int = 0  # of the base's matrices that have an adapter
    forward: int = 0  # of the base alone
    lora_forward: int = 0
    backward: int = 0
    recomputed: int = 0  # what activation checkpointing computes again
    kept: int = 0
    kept_once: int = 0
    kept_checkpointed: int = 0
    temporary: int = 0  # while a block's gradient passes

    @property
    def trained(self) -> int:
        """FLOPs of an evaluation with its backward pass."""
        return self.forward + self.lora_forward + self.backward

    def activations(self, rows: int, checkpointing: bool) -> int:
        """Peak bytes of a forward and backward pass over ``rows`` evaluations, beside weights and gradients.

        Kernels' workspaces and what the allocator loses to rounding come on top.
        """
        kept = self.kept_checkpointed if checkpointing else self.kept
        return rows * (kept + self.temporary) + self.kept_once


def measure(shape: TransformerShape, image_tokens: int, text_tokens: int, lora: Lora | None, half: bool) -> Cost:
    """The cost of an evaluation; ``half`` is for fp16 or bf16 under autocast on a GPU, else float32.

    In half precision autocast computes normalisations in float32, and so keeps their inputs twice as wide; every
    adapter keeps its input anew, which in float32 is shared by queries, keys and values.
    """
    walk = _Walk(shape, image_tokens, text_tokens, lora, 2 if half else 4)
    walk.run()
    return walk.cost


@dataclass
class _Walk:
    """Counts layer after layer; the methods say whether a gradient flows into what a layer gives."""

    shape: TransformerShape
    image_tokens: int
    text_tokens: int
    lora: Lora | None
    item: int  # bytes of a value
    cost: Cost = field(default_factory=Cost)
    _kept_source: str = ""  # the input that the last adapter kept

    def run(self) -> None:
        """Fill ``cost``, from the patch embedding to the last projection."""
        shape, cost, width = self.shape, self.cost, self.shape.width
        patch = shape.patch**2
        cost.buffers = shape.pos_embed_max_size**2 * width
        self.linear("pos_embed.proj", self.image_tokens, patch * shape.in_channels, width, False)
        for name, size in (("timestep", _TIME_FEATURES), ("text", shape.pooled_width)):
            self.linear(f"time_text_embed.{name}_embedder.linear_1", 1, size, width, False)
            self.linear(f"time_text_embed.{name}_embedder.linear_2", 1, width, width, False)
        text = self.linear("context_embedder", self.text_tokens, shape.text_width, width, False)
        image = False
        block_input = (self.image_tokens + self.text_tokens) * width * self.item
        # The widest tensor and its gradient; in half precision one in float32 is about as large as a third.
        cost.temporary = (3 if self.item == 2 else 2) * self.image_tokens * 4 * width * self.item
        for index in range(shape.layers):
            before = (cost.parameters, cost.kept, cost.forward + cost.lora_forward)
            image, text = self.block(index, image, text)
            cost.largest_block = max(cost.largest_block, cost.parameters - before[0])
            # The inputs of later blocks are gone when the backward pass comes to this one.
            there = (index + 1) * block_input + cost.kept - before[1]
            cost.kept_checkpointed = max(cost.kept_checkpointed, there)
            cost.recomputed += cost.forward + cost.lora_forward - before[2]
        self.modulation("norm_out.linear", 2, False)
        self.normalise(self.image_tokens, image, scales=1)
        self.linear("proj_out", self.image_tokens, width, patch * shape.out_channels, image)

    def block(self, index: int, image: bool, text: bool) -> tuple[bool, bool]:
        """A joint block; whether gradients flow into the picture's and the text's tokens after it."""
        name, last = f"transformer_blocks.{index}", index == self.shape.layers - 1
        dual = index in self.shape.dual_layers
        self.modulation(f"{name}.norm1.linear", 9 if dual else 6, True)
        self.modulation(f"{name}.norm1_context.linear", 2 if last else 6, not last)
        self.normalise(self.image_tokens, image, scales=2 if dual else 1)
        self.normalise(self.text_tokens, text, scales=1)
        after_image, after_text = self.joint_attention(f"{name}.attn", image, text, last)
        if dual:
            after_image = self.image_attention(f"{name}.attn2", image) or after_image
        image = self.feed_forward(f"{name}.ff", self.image_tokens, image or after_image)
        if not last:
            text = self.feed_forward(f"{name}.ff_context", self.text_tokens, text or after_text)
        return image, text

    def joint_attention(self, name: str, image: bool, text: bool, last: bool) -> tuple[bool, bool]:
        """Attention over the tokens of picture and text together; the last block drops what the text gets."""
        width, flows = self.shape.width, False
        for part, tokens, into in (("to", self.image_tokens, image), ("add", self.text_tokens, text)):
            for letter in "qkv":
                layer = f"{name}.{part}_{letter}" + ("_proj" if part == "add" else "")
                out = self.linear(layer, tokens, width, width, into, source=f"{name}.{part}")
                flows = self.qk_norm(tokens, out, letter) or flows
        self.attention(self.image_tokens + self.text_tokens, flows)
        image = self.linear(f"{name}.to_out.0", self.image_tokens, width, width, flows)
        if last:
            return image, False
        return image, self.linear(f"{name}.to_add_out", self.text_tokens, width, width, flows)

    def image_attention(self, name: str, image: bool) -> bool:
        """The second attention of a dual block, over the picture's tokens."""
        width, tokens, flows = self.shape.width, self.image_tokens, False
        for letter in "qkv":
            out = self.linear(f"{name}.to_{letter}", tokens, width, width, image, source=name)
            flows = self.qk_norm(tokens, out, letter) or flows
        self.attention(tokens, flows)
        return self.linear(f"{name}.to_out.0", tokens, width, width, flows)

    def feed_forward(self, name: str, tokens: int, flows: bool) -> bool:
        """Norm, two layers, GELU between them; kept is GELU's input."""
        width = self.shape.width
        self.normalise(tokens, flows, scales=1)
        inner = self.linear(f"{name}.net.0.proj", tokens, width, 4 * width, flows)
        if inner:
            self.cost.kept += tokens * 4 * width * self.item
        return self.linear(f"{name}.net.2", tokens, 4 * width, width, inner) or flows

    # --- layers --------------------------------------------------------------------------------------------------

    def linear(self, name: str, tokens: int, fan_in: int, fan_out: int, flows: bool, source: str = "") -> bool:
        """``source`` names an input that several layers share."""
        cost, product = self.cost, 2 * tokens * fan_in * fan_out
        cost.parameters += (fan_in + 1) * fan_out
        cost.forward += product
        cost.backward += product if flows else 0
        if self.lora is None or not self.lora.covers(name):
            return flows
        rank = self.lora.rank
        down, up = 2 * tokens * fan_in * rank, 2 * tokens * rank * fan_out
        cost.lora_layers += 1
        cost.adapted_parameters += fan_in * fan_out
        cost.lora_parameters += rank * (fan_in + fan_out)
        cost.lora_forward += down + up
        cost.backward += down + 2 * up + (down if flows else 0)
        if self.item == 2 or source != self._kept_source:
            cost.kept += tokens * fan_in * self.item
        self._kept_source = source or name
        cost.kept += tokens * rank * self.item
        if self.item == 2:
            cost.kept_once += rank * (fan_out + (fan_in if flows else 0)) * self.item
        return True

    def attention(self, tokens: int, flows: bool) -> None:
        """Softmax attention in one kernel: queries, keys, values, result and a float32 a row and head are kept."""
        products = 4 * tokens**2 * self.shape.width
        self.cost.forward += products
        if flows:
            self.cost.backward += int(ATTENTION_BACKWARD * products)
            self.cost.kept += 4 * tokens * self.shape.width * self.item + 4 * tokens * self.shape.heads

    def qk_norm(self, tokens: int, flows: bool, letter: str) -> bool:
        """RMS norm of queries and keys, computed in float32; kept are its input and one float32 a token and head."""
        if self.shape.qk_norm and letter != "v":
            self.cost.parameters += self.shape.head_dim
            if flows:
                wide = 4 if self.item == 2 else 0
                self.cost.kept += tokens * self.shape.width * (self.item + wide) + 4 * tokens * self.shape.heads
        return flows

    def normalise(self, tokens: int, flows: bool, scales: int) -> None:
        """Layer norm without weights, in float32, times one or two scales a picture."""
        if flows:
            self.cost.kept += 4 * tokens * (self.shape.width + 2) + scales * self.shape.width * self.item

    def modulation(self, name: str, parts: int, kept: bool) -> None:
        """Shifts, scales and gates from time and pooled text; kept are they all, where one is a gate."""
        self.linear(name, 1, self.shape.width, parts * self.shape.width, False)
        self.cost.kept += parts * self.shape.width * self.item if kept and self.lora else 0
