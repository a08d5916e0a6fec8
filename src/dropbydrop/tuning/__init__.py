"""Fine-tuning of a quantized checkpoint: codebooks, scales and norms; codes stay as they are.

pipeline.py is the life-cycle, config.py its settings, job.py a request that was opened and checked,
distill.py and blocks.py the two methods; student.py is the quantized model with gradients
(decode.py), optimizer.py what is trained and Adam, writer.py writes the result. docs/tuning.md has
what it buys.
"""
