"""DPO examples of other trainers, as facts: their keys and values, without their text. Read in November 2026."""

AXOLOTL = """
base_model: meta-llama/Meta-Llama-3-8B-Instruct
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
special_tokens: {pad_token: <|finetune_right_pad_id|>, eos_token: <|eot_id|>}
load_in_8bit: true
load_in_4bit: false
chat_template: llama3
rl: dpo
datasets:
  - path: fozziethebeat/alpaca_messages_2k_dpo_test
    type: chat_template.default
    field_messages: conversation
    field_chosen: chosen
    field_rejected: rejected
    message_property_mappings: {role: role, content: content}
    roles: {system: [system], user: [user], assistant: [assistant]}
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/lora-out
sequence_len: 4096
sample_packing: false
pad_to_sequence_len: true
adapter: lora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
wandb_entity:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
"""

AXOLOTL_QLORA = """
base_model: meta-llama/Meta-Llama-3-8B
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
strict: false
dpo_beta: 0.1
rl: dpo
datasets:
  - {ds_type: json, data_files: [mlabonne/orpo-dpo-mix-40k], split: train, type: llama3.argilla_chat}
val_set_size: 0
output_dir: ./qlora-out
adapter: qlora
sequence_len: 4096
lora_r: 32
lora_alpha: 16
lora_target_linear: true
lora_fan_in_fan_out:
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
early_stopping_patience:
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
debug:
deepspeed: deepspeed_configs/zero2.json
fsdp:
"""

LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid
dataset: dpo_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/dpo
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""

LLAMA_FACTORY_FULL = """
model_name_or_path: Qwen/Qwen2.5-0.5B
stage: dpo
finetuning_type: full
pref_beta: 0.1
pref_ftx: 0.25
pref_bco_weight: 1.0
dpo_label_smoothing: 0.0
template: qwen
cutoff_len: 512
val_size: 0.1
eval_strategy: steps
eval_steps: 500
output_dir: saves/qwen
deepspeed: examples/deepspeed/ds_z3_config.json
flash_attn: fa2
report_to: none
"""

OPEN_INSTRUCT = """
model_name_or_path: allenai/OLMo-2-1124-7B-SFT
use_flash_attn: true
gradient_checkpointing: true
dataset_mixer:
  allenai/olmo-2-1124-13b-preference-mix: 1.0
tokenizer_name: allenai/OLMo-2-1124-7B-SFT
use_slow_tokenizer: false
max_seq_length: 2048
preprocessing_num_workers: 16
per_device_train_batch_size: 1
gradient_accumulation_steps: 4
learning_rate: 5.0e-7
lr_scheduler_type: linear
warmup_ratio: 0.1
weight_decay: 0.0
num_train_epochs: 1
output_dir: output/dpo_7b
with_tracking: true
report_to: [wandb]
logging_steps: 1
use_lora: false
dpo_loss_type: dpo_norm
dpo_beta: 5
checkpointing_steps: 1000
hf_metadata_dataset: allenai/olmo-instruct-evals
add_bos: true
"""

OPEN_INSTRUCT_MIX = """
model_name_or_path: /model
model_revision: main
use_flash_attn: true
gradient_checkpointing: true
dataset_mixer:
  allenai/ultrafeedback_binarized_cleaned_train: 1.0
  ai2-adapt-dev/DaringAnteater-prefs-RM-filter: 0.5
  ai2-adapt-dev/WildChat-prefs-280824: 1000
tokenizer_name: /model
use_slow_tokenizer: true
max_seq_length: 2048
preprocessing_num_workers: 16
per_device_train_batch_size: 1
gradient_accumulation_steps: 16
learning_rate: 5.0e-7
lr_scheduler_type: linear
warmup_ratio: 0.1
weight_decay: 0.0
num_train_epochs: 1
output_dir: /output
with_tracking: true
report_to: [wandb]
logging_steps: 1
use_lora: false
dpo_loss_type: dpo_norm
dpo_beta: 5
checkpointing_steps: 1000
"""

OPEN_INSTRUCT_COMMAND = r"""
# launched on its own cluster
MODEL_NAME=allenai/OLMo-2-0425-1B-SFT
python mason.py --cluster ai2/augusta --num_nodes 1 --gpus 8 -- accelerate launch --mixed_precision bf16 \
    --num_processes 8 --use_deepspeed open_instruct/dpo_tune_cache.py \
    --exp_name my_dpo \
    --learning_rate 2.5e-6 \
    --seed 111 \
    --model_name_or_path $MODEL_NAME \
    --tokenizer_name_or_path $MODEL_NAME \
    --use_flash_attn \
    --max_seq_length 2048 \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps $((128 / 8)) \
    --lr_scheduler_type linear \
    --warmup_ratio 0.1 \
    --num_train_epochs 1 \
    --with_tracking \
    --logging_steps 1 \
    --gradient_checkpointing \
    --dataset_mixer_list allenai/olmo-2-0425-1b-preference-mix 1.0 \
        VGraf/general_responses_dev_8maxturns 2247 \
    --use_slow_tokenizer False \
    --add_bos \
    --chat_template_name tulu \
    --use_lora False \
    --oe_eval_tasks "gpqa:0shot_cot::qwen3-instruct,ifeval" \
    --dpo_loss_type dpo_norm \
    --dpo_beta 5 && echo done
"""

OPENRLHF_COMMAND = r"""
set -x
save=./checkpoint/llama3-8b-dpo
read -r -d '' training_commands <<EOF
openrlhf.cli.train_dpo \
   --save_path ${save} \
   --save_steps -1 \
   --logging_steps 1 \
   --eval_steps -1 \
   --train_batch_size 256 \
   --micro_train_batch_size 1 \
   --pretrain OpenRLHF/Llama-3-8b-sft-mixture \
   --bf16 \
   --max_epochs 1 \
   --max_len 8192 \
   --zero_stage 3 \
   --learning_rate 5e-7 \
   --lr_warmup_ratio 0.03 \
   --beta 0.1 \
   --nll_loss_coef 0.1 \
   --adam_betas 0.9 0.98 \
   --dataset OpenRLHF/a,OpenRLHF/b \
   --dataset_probs 0.8,0.2 \
   --apply_chat_template \
   --chosen_key chosen \
   --rejected_key messages_initial \
   --attn_implementation flash_attention_2 \
   --load_checkpoint \
   --packing_samples \
   --zpg 2 \
   --gradient_checkpointing
EOF
   # --ipo [for IPO]
torchrun --standalone --nproc-per-node ${NPROC_PER_NODE:-8} -m $training_commands
"""

MS_SWIFT_COMMAND = r"""
NPROC_PER_NODE=4 \
CUDA_VISIBLE_DEVICES=0,1,2,3 \
swift rlhf \
    --rlhf_type dpo \
    --model Qwen/Qwen2.5-7B-Instruct \
    --train_type full \
    --dataset hjh0119/shareAI-Llama3-DPO-zh-en-emoji \
    --split_dataset_ratio 0.01 \
    --torch_dtype bfloat16 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 \
    --learning_rate 1e-5 \
    --gradient_accumulation_steps 1 \
    --eval_steps 100 \
    --save_steps 100 \
    --save_total_limit 2 \
    --logging_steps 5 \
    --max_length 8192 \
    --output_dir output \
    --warmup_ratio 0.05 \
    --save_only_model true \
    --dataloader_num_workers 4 \
    --dataset_num_proc 4 \
    --deepspeed zero3 \
    --attn_impl flash_attn \
    --rpo_alpha 0.1 \
    --padding_free true
"""

MS_SWIFT_MPO_COMMAND = r"""
nproc_per_node=4
swift rlhf \
    --rlhf_type dpo \
    --model Qwen/Qwen2.5-VL-7B-Instruct \
    --dataset 'swift/RLAIF-V-Dataset#20000' \
    --split_dataset_ratio 0.01 \
    --train_type full \
    --torch_dtype bfloat16 \
    --loss_type sigmoid bco_pair sft \
    --loss_weights 0.8 0.2 1.0 \
    --rpo_alpha 0.0 \
    --num_train_epochs 1 \
    --learning_rate 1e-5 \
    --freeze_vit true \
    --gradient_accumulation_steps $(expr 16 / $nproc_per_node) \
    --eval_steps 100 \
    --save_steps 100 \
    --deepspeed zero3 \
    --max_length 4096 \
    --warmup_ratio 0.05
"""
