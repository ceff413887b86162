"""What every rank needs, imported once in the process that ranks are forked from; no operation is run here."""

import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.checkpoint.state_dict_saver
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor.parallel  # noqa: F401

import treadle.recipes.pretrain
import treadle.recipes.task
import treadle.train.session  # noqa: F401
