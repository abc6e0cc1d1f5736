"""What every model's process needs, imported once: they are forked from a process that has imported this.

It has also compiled one model, and exported it without lorac, so that tables which the exporters build on first use
count for neither side of any model.
"""

import gc

import diffusers  # noqa: F401  (imported for its own sake, as are all here)
import peft  # noqa: F401  (see above)
import timm  # type: ignore[import-not-found]  # noqa: F401  (see above)
import torch
import torchvision  # type: ignore[import-untyped]  # noqa: F401  (see above)
import tqdm
import transformers

from campaigns.zoo import checking
from campaigns.zoo.entries import entry

torch.set_num_threads(1)
tqdm.tqdm.monitor_interval = 0  # else its thread is forked, too
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
checking.check(entry("transformers/llama"), ways=(("onnxruntime", "live"),))
# A session of ONNX Runtime waits at its end for its threads, which a forked process does not have: it ends here.
gc.collect()
