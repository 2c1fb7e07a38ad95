"""Times train steps of DeiT in PyTorch, as timm has it, under torch.compile: what plain DeiT is compared with.

    python -m benchmarks.vision_peer --check                prints the versions; fails where something is missing
    python -m benchmarks.vision_peer < REQUEST.json         prints the result as one line of JSON

`python -m benchmarks.vision --peer` calls it, in a process of its own. Parameters and AdamW's state are float32,
products bfloat16 (autocast), attention is torch's `scaled_dot_product_attention`; the optimizer is fused. As in DeiT's
recipe targets are soft, layers are dropped, weights are averaged, and gradients are not clipped. Images stay on the
device as bytes and are normalised in the step, as ours are. On a GPU only: elsewhere the numbers would say nothing.
"""

from __future__ import annotations

from typing import Any

from benchmarks.torch_steps import serve, timed_steps

# Of a request: model (timm's name), arguments (of `timm.create_model`), batch_size, shape ([channels, size, size]),
# num_classes, label_smoothing, mean and deviation (of the channels; white is 1), ema_decay, steps, rounds, seed.


def versions() -> str:
    """Of what is needed.

    Raises:
        ModuleNotFoundError: torch or timm is not installed.
    """
    import timm
    import torch

    return f"torch {torch.__version__}, timm {timm.__version__}"


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a train step, as `timed_steps` has them, and the number of parameters."""
    import timm
    import torch
    from torch.nn import functional

    torch.manual_seed(request["seed"])
    torch.set_float32_matmul_precision("high")
    model = timm.create_model(request["model"], **request["arguments"]).cuda().train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True)
    averaged = [parameter.detach().clone() for parameter in parameters]
    rows, classes = request["batch_size"], request["num_classes"]
    images = torch.randint(256, (rows, *request["shape"]), dtype=torch.uint8, device="cuda")
    labels, share = torch.randint(classes, (2, rows), device="cuda"), torch.rand(rows, 1, device="cuda")
    first, second = (functional.one_hot(part, classes).float() for part in labels)
    targets = torch.lerp(share * first + (1 - share) * second, torch.full_like(first, 1 / classes),
                         request["label_smoothing"])  # fmt: skip
    mean, deviation = (
        torch.tensor(request[name], device="cuda").reshape(1, -1, 1, 1) for name in ("mean", "deviation")
    )

    @torch.compile
    def loss_of(images: Any, targets: Any) -> Any:
        logits = model((images.float() / 255 - mean) / deviation)
        return functional.cross_entropy(logits, targets)

    def step() -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = loss_of(images, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if request["ema_decay"]:
            with torch.no_grad():
                torch._foreach_lerp_(averaged, parameters, 1 - request["ema_decay"])
        return loss

    return timed_steps(step, request) | {"parameters": sum(parameter.numel() for parameter in parameters)}


if __name__ == "__main__":
    serve("Times DeiT's train step in PyTorch.", versions, run)
