"""The parts of scripts/lora_finetune.py, in the order in which it uses them."""
