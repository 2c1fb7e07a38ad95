"""Times train steps of OLMo 2 in PyTorch, as transformers has it, under torch.compile: what row 1 is compared with.

    python -m benchmarks.peer --check                       prints the versions; fails where something is missing
    python -m benchmarks.peer < REQUEST.json                prints the result as one line of JSON

`python -m benchmarks.training --peer` calls it, in a process of its own: nothing here imports JAX, so the interpreter
may be another one's. Parameters and AdamW's state are float32, products bfloat16 (autocast), attention is torch's
`scaled_dot_product_attention`; the optimizer is fused, gradients are clipped, and the step is compiled but for that.
On a GPU only: elsewhere the numbers would say nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

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
    """Seconds of a train step, a median of each round of steps."""
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

    began = time.perf_counter()
    for _ in range(3):
        loss = step()
    torch.cuda.synchronize()
    compile_seconds = time.perf_counter() - began
    times = []
    for _ in range(request["rounds"]):
        began = time.perf_counter()
        for _ in range(request["steps"]):
            loss = step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / request["steps"])
    return {
        "versions": versions(),
        "seconds_per_step": times,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "compile_seconds": compile_seconds,
        "loss": float(loss),
        "device": torch.cuda.get_device_name(),
    }


def main() -> None:
    """Checks, or serves one request."""
    parser = argparse.ArgumentParser(description="Times OLMo 2's train step in PyTorch.")
    parser.add_argument("--check", action="store_true", help="only say what is installed")
    arguments = parser.parse_args()
    try:
        found = versions()
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed in {sys.executable}")
    print(found if arguments.check else json.dumps(run(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
