"""One thread: these models are too small for more, and bit-equality then doesn't hang on the number of cores."""

import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
