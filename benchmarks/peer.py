"""Times train steps of OLMo 2 in PyTorch, as transformers has it, under torch.compile: what row 1 is compared with.

    python -m benchmarks.peer --check                       prints the versions; fails where something is missing
    python -m benchmarks.peer < REQUEST.json                prints the result as one line of JSON

`python -m benchmarks.training --peer` calls it, in a process of its own. Parameters and AdamW's state are float32,
products bfloat16 (autocast), attention is torch's `scaled_dot_product_attention`; the optimizer is fused, gradients are
clipped, and the step is compiled but for that. On a GPU only: elsewhere the numbers would say nothing.
"""

from __future__ import annotations

from typing import Any

from benchmarks.torch_steps import serve, timed_steps

# Of a request: model (arguments of transformers' Olmo2Config), batch_size, sequence_length, steps, rounds, seed.


def versions() -> str:
    """Of what is needed.

    Raises:
        ModuleNotFoundError: torch or transformers is not installed.
    """
    import torch
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a train step, as `timed_steps` has them, and the number of parameters."""
    import torch
    from transformers import Olmo2Config, Olmo2ForCausalLM

    torch.manual_seed(request["seed"])
    torch.set_float32_matmul_precision("high")
    model = Olmo2ForCausalLM(Olmo2Config(**request["model"], attn_implementation="sdpa", use_cache=False)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled = torch.compile(model)
    shape = request["batch_size"], request["sequence_length"]
    tokens = torch.randint(request["model"]["vocab_size"], shape, device="cuda")

    def step() -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return timed_steps(step, request) | {"parameters": sum(p.numel() for p in model.parameters())}


if __name__ == "__main__":
    serve("Times OLMo 2's train step in PyTorch.", versions, run)
