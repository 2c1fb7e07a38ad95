"""What people call a config field or a flag elsewhere, so that a wrong name is answered with ours.

`did_you_mean` looks here first, as no spelling leads from "lr" to "learning_rate", and then for the nearest spelling. A
name that stands here is an answer, not another way to set the field.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

_NEAR = 0.6  # share of letters in common

# Field -> its names elsewhere: in papers, in other trainers, in other libraries' model configs. One with a section in
# front is meant in that section alone.
FIELDS = {
    "model.vocab_size": "n_vocab vocab vocabulary_size padded_vocab_size",
    "model.num_layers": "n_layer n_layers layers num_hidden_layers num_blocks n_blocks",
    "model.width": "d_model hidden_size hidden_dim n_embd embed_dim emb_dim model_dim dim dmodel",
    "model.num_heads": "n_head n_heads heads num_attention_heads num_query_heads",
    "model.num_kv_heads": "n_kv_head n_kv_heads kv_heads num_key_value_heads num_query_groups",
    "model.head_dim": "d_head head_size d_k d_kv kv_channels",
    "model.ffn_width": "d_ff ffn_dim ffn_size ffn_hidden_size intermediate_size mlp_dim mlp_hidden_size",
    "model.norm": "norm_order norm_position pre_norm post_norm",
    "model.depth": "depth_mechanism mechanism residual",
    "model.rope_theta": "rope_base rotary_base theta rotary_emb_base",
    "model.norm_epsilon": "rms_norm_eps norm_eps layer_norm_eps layernorm_epsilon",
    "model.tie_embeddings": "tie_word_embeddings weight_tying tied_embeddings share_embeddings",
    "model.max_sequence_length": "max_position_embeddings model.seq_len model.context_length model.max_seq_len",
    "model.initializer_range": "init_std initializer_std init_scale",
    "model.attention_implementation": "attn_implementation attn_impl attention_impl attention_backend attention kernel",
    "model.dtype": "precision compute_dtype torch_dtype bf16 fp16 amp mixed_precision",
    "model.remat": "gradient_checkpointing activation_checkpointing remat_policy recompute",
    "model.layer_loop": "scan_layers unroll",
    "model.stochastic_depth": "drop_path drop_path_rate droppath stochastic_depth_rate layerdrop",
    "model.ffn": "activation act_fn hidden_act mlp ffn_type mlp_type",
    "model.norm_kind": "norm_type norm_layer",
    "model.biases": "bias use_bias qkv_bias attention_bias mlp_bias",
    "model.image.size": "img_size image_size input_size resolution",
    "model.image.patch_size": "patch",
    "model.image.num_classes": "nb_classes n_classes classes",
    "data.source": "data dataset dataset_name dataset_path data_path data_dir train_file corpus",
    "data.tokenizer": "tokenizer_name tokenizer_path tokenizer_file",
    "data.sequence_length": "seq_len seqlen seq_length max_seq_len max_seq_length max_length context_length "
    "block_size ctx_len n_ctx data.context",
    "data.end_of_text": "eos eos_token eod",
    "data.validation_fraction": "val_fraction valid_fraction eval_fraction val_split test_size",
    "data.cache_dir": "cache cache_directory",
    "data.images.augmentation_repeats": "repeated_aug aug_repeats num_repeats repeated_augmentation",
    "data.prefetch_batches": "prefetch num_workers prefetch_factor",
    "optimizer.name": "optim optimizer_type optimizer_name opt",
    "optimizer.schedule": "lr_schedule lr_scheduler lr_scheduler_type scheduler learning_rate_schedule",
    "optimizer.learning_rate": "lr max_lr peak_lr base_lr learningrate peak_learning_rate init_lr",
    "optimizer.final_learning_rate_fraction": "min_lr final_lr lr_min end_lr min_lr_ratio alpha min_learning_rate",
    "optimizer.warmup_steps": "warmup warmup_iters lr_warmup num_warmup_steps warmup_ratio warmup_tokens",
    "optimizer.beta1": "b1 adam_beta1 betas",
    "optimizer.beta2": "b2 adam_beta2",
    "optimizer.epsilon": "eps adam_eps adam_epsilon",
    "optimizer.weight_decay": "wd decay l2",
    "optimizer.gradient_clip_norm": "grad_clip clip clip_norm max_grad_norm clip_grad_norm gradient_clipping "
    "grad_norm_clip gradient_clip_val",
    "optimizer.ema_decay": "ema model_ema model_ema_decay ema_rate polyak",
    "train.num_steps": "steps max_steps total_steps train_steps num_train_steps training_steps max_iters iters "
    "iterations num_iterations epochs num_epochs num_train_epochs",
    "train.batch_size": "bs batch global_batch_size global_batch total_batch_size per_device_train_batch_size",
    "train.accumulation_steps": "grad_accum gradient_accumulation gradient_accumulation_steps grad_accum_steps accum "
    "accum_steps micro_batches num_microbatches microbatches",
    "train.seed": "random_seed rng_seed",
    "train.z_loss": "z_loss_weight zloss z_loss_coefficient",
    "train.log_interval_steps": "log_every log_interval log_steps logging_steps log_frequency",
    "train.init_from": "init_checkpoint pretrained pretrained_model finetune_from load_from load_checkpoint",
    "train.trackers": "report_to logger loggers tracker wandb tensorboard",
    "train.sample_prompt": "prompt",
    "eval.interval_steps": "eval_every eval_interval eval_steps eval_frequency val_interval val_check_interval "
    "eval.every eval.interval eval.steps",
    "eval.num_batches": "eval_iters eval_batches val_batches eval.batches eval.iters",
    "checkpoint.interval_steps": "save_every save_interval save_steps ckpt_every checkpoint_every checkpoint_interval "
    "checkpoint.every checkpoint.interval checkpoint.steps",
    "checkpoint.keep_last": "save_total_limit max_to_keep keep keep_last_n checkpoint.max_to_keep",
    "mesh.data": "dp data_parallel data_parallelism ddp",
    "mesh.fsdp": "zero fully_sharded fsdp_parallelism",
    "mesh.tensor": "tp tensor_parallel model_parallel tensor_model_parallel_size tensor_parallelism",
    "mesh.context": "cp sp context_parallel sequence_parallel context_parallelism",
}  # fmt: skip
# Flag -> its names elsewhere.
FLAGS = {
    "workdir": "run run-dir rundir dir model model-dir checkpoint-dir work-dir logdir log-dir",
    "output": "out out-dir output-dir save-dir outdir",
    "config": "cfg conf config-file",
    "step": "checkpoint-step ckpt",
    "prompt": "text input",
    "max-tokens": "max-new-tokens num-tokens length tokens max-length n-tokens",
    "temperature": "temp t",
    "top-k": "topk k",
    "top-p": "topp nucleus p",
    "stop": "stop-sequence stop-string eos",
    "tasks": "task eval-tasks",
    "num-fewshot": "fewshot shots n-shot num-shots",
    "context": "seq-len sequence-length max-length context-length",
    "data": "dataset text file corpus",
    "attention-maps": "maps attention plot",
    "depth-probes": "probes probe",
    "checkpoint": "ckpt from input model",
    "tokenizer": "tokenizer-path vocab",
}


def did_you_mean(name: str, known: Collection[str], others: dict[str, str]) -> str | None:
    """The known name that is meant by a wrong one; None: nothing is near.

    Args:
        name: as it came; of a field with its sections, "train.lr".
        known: what there is.
        others: `FIELDS` or `FLAGS`.
    """
    lower = name.lower()
    for wanted in (lower, lower.rpartition(".")[2]):
        for field, names in others.items():
            if field in known and wanted in names.split():
                return field
    inside = [field for field in known if field.rpartition(".")[2] == lower.rpartition(".")[2]]
    if len(inside) == 1:  # the right field in the wrong section, or in none
        return inside[0]
    near = difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)
    return near[0] if near else None
