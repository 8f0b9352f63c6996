"""Write tests/fixtures/toy.safetensors, the toy's logits as transformers computes them.

    pip install transformers==5.23.0
    PYTHONPATH=. python tests/make_toy_fixture.py

Run by hand after a new toy was trained; nothing else here needs transformers.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import SmolVLMForConditionalGeneration

from minioutro import Processor, read_video

TOY = Path(__file__).parent.parent / "minioutro" / "toy"
QUESTION = "What happens in this video?"
LAST = 24                           # of the prompt's positions: a few KB are enough

torch.set_num_threads(1)
torch.set_grad_enabled(False)
model = SmolVLMForConditionalGeneration.from_pretrained(
    TOY, dtype=torch.float32, attn_implementation="eager").eval()
processor = Processor.from_pretrained(TOY)
video = read_video(TOY / "clip.mp4", longest_edge=processor.longest_edge)
inputs = processor(video, QUESTION)
logits = model(input_ids=inputs.input_ids, pixel_values=inputs.pixel_values).logits
answer = model.generate(input_ids=inputs.input_ids, pixel_values=inputs.pixel_values,
                        do_sample=False, max_new_tokens=64)[:, inputs.input_ids.shape[1]:]
save_file({"logits": logits[:, -LAST:].contiguous(), "answer": answer.contiguous()},
          Path(__file__).parent / "fixtures" / "toy.safetensors")
print(processor.decode(answer[0].tolist()))
