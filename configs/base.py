"""Every configuration key, once: its default, its bound and its unit. The other configs change values only."""

from ml_collections import ConfigDict

from configs import keys
from configs.keys import at_least, choices, fraction, key, pairs, patterns, triples

# Where the dimensions of parameters and activations go: logical axis -> mesh axes.
SHARDING_RULES = (
    ("batch", ("data", "fsdp", "expert")),  # sequences of a batch
    ("length", None),  # tokens of a sequence
    ("layers", None),  # the scanned axis
    ("embed", ("fsdp", "expert")),  # d_model of parameters that all experts share
    ("expert_embed", "fsdp"),  # d_model of an expert's
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),  # hidden units of an expert
    ("experts", "expert"),
)


# Which leaves are trained, by what is trained: an anchor; an owner's expert, alone or in a pair; a merged model's
# router; all of it.
PARTITIONS = {
    # The router of an anchor waits for other experts: alone, it has nothing to route.
    "anchor": ((r"blocks/moe/anchor/router/.*", "frozen"), (r".*", "trainable")),
    "solo": (
        (r"blocks/moe/expert/router/.*", "frozen"),
        (r"blocks/moe/expert/.*", "trainable"),
        (r".*", "frozen"),
    ),
    "pair": ((r"blocks/moe/expert/.*", "trainable"), (r".*", "frozen")),
    "router": ((r"blocks/moe/experts/router/.*|selector/.*", "trainable"), (r".*", "frozen")),
    "joint": ((r".*", "trainable"),),
}

# Keys and sections that had another name: {old name: new name}.
RENAMED = {
    "mixture": "moe",
    "data.accumulate": "data.grad_accum_steps",
    "init.row_file": "init.router_weight_file",
    "init.row_stddev": "init.router_weight_stddev",
    "init.bias": "init.router_bias",
}


def get_config() -> ConfigDict:
    """Returns the defaults: an untrained anchor of no particular size. Locked: an unknown key is an error."""
    return keys.defaults(declare())


def declare() -> ConfigDict:
    """Declares all keys, each with its default and, where it has one, its bound (configs/keys.py)."""
    config = ConfigDict()

    config.seed = key(0, at_least(0, below=2**32, shown="2**32"))  # of initialisation and of the order of the data
    config.steps = key(0, at_least(1))  # optimizer steps of the whole run
    # Model directory to start from (an owner's anchor, a coordinator's merge); "": fresh weights.
    config.start_from = ""
    config.expert = ""  # name of the expert to train against start_from; "": train the model itself
    # How it is trained: "solo", alone with weight 1 in the frozen anchor; "pair", beside the anchor's own feed-forward,
    # with a router.
    config.expert_layout = key("solo", choices(registry="model.architecture:EXPERT_LAYOUTS"))
    # Ordered (regular expression of a leaf's whole path, "trainable" or "frozen"); the first match decides.
    config.partition = key(((".*", "trainable"),), pairs)

    config.model = ConfigDict()  # architecture of fresh weights; start_from brings its own
    config.model.vocab_size = 0  # token ids
    config.model.num_layers = 0  # blocks
    config.model.d_model = 0  # width of the residual stream
    config.model.num_heads = 0  # query heads of a block
    config.model.num_kv_heads = 0  # below num_heads: grouped-query attention
    config.model.d_ff = 0  # hidden units of one expert
    config.model.rope_theta = 500_000.0  # base of the rotary frequencies
    config.model.norm_eps = 1e-6  # added to the mean square of an RMSNorm
    config.model.tied_embeddings = False  # whether the head is the embedding, transposed
    config.model.norm_topk_prob = False  # whether the weights of a token's top-k experts are made to sum to 1
    config.model.expert = key("swiglu", choices(registry="model.experts:EXPERT_KINDS"))  # kind of expert
    config.model.router = key("linear", choices(registry="model.routers:ROUTERS"))  # kind of router

    config.moe = ConfigDict()  # of fresh weights, for `benchmark` and `plan`; start_from brings its own
    config.moe.num_experts = key(1, at_least(1))  # stacked experts, the anchor included; 1: none to route between
    config.moe.top_k = key(1, at_least(1))  # experts that compute each token

    config.init = ConfigDict()  # of fresh weights, and of a new expert's leaves beside its copy of the anchor's
    config.init.embedding_stddev = 0.02  # of fresh embeddings; every other matrix has 0.02
    config.init.router_weight_file = ""  # .npy of [d_model] or [layers, d_model]: a new expert's; "": truncated normal
    config.init.router_weight_stddev = 0.002  # of a new expert's truncated normal
    config.init.router_bias = -0.1  # b of every layer; its effect on the logit is -|b|, and at exactly 0 it stays 0

    config.compute = ConfigDict()  # how steps are computed
    config.compute.dtype = key("float32", choices("float32", "bfloat16"))  # activations and matmuls
    config.compute.frozen_dtype = key("float32", choices("float32", "bfloat16"))  # frozen leaves in memory
    # What the backward pass recomputes, from nothing to everything: "none", "dots" (all but matmuls, attention and
    # stacked experts), "feed_forward" (all but the feed-forward's matmuls, attention and stacked experts), "kernels"
    # (all but attention and stacked experts; of experts on a CPU, all but their sums), "full".
    config.compute.remat = key("none", choices(registry="model.decoder:REMAT_POLICIES"))
    # Kernels of attention, and of the dispatch of tokens to stacked experts; "auto" chooses by the devices, and most
    # kernels run on one kind of device only.
    config.compute.attention = key("auto", choices("auto", registry="model.kernels.causal_attention:KERNELS"))
    # See compute.attention.
    config.compute.dispatch = key("auto", choices("auto", registry="model.dispatch:DISPATCH"))
    config.compute.unroll = key(1, at_least(1))  # blocks per iteration of the scan over layers

    config.data = ConfigDict()  # what is trained on, and in which batches
    config.data.train = ""  # corpus directory, or several with commas between
    config.data.public_share = key(0.0, at_least(0, below=1))  # share of sequences from public data, not data.train
    config.data.public = ""  # corpus directory of public data; "": the sample that came with start_from
    # Instead of data.train, sources of data: (name, corpus directories with commas between, weight). A weight is the
    # share of sequences, relative to the others; 0: none until a phase gives the source one.
    config.data.mixture = key((), triples)
    # Phases with other weights, such as annealing: (the step that it begins with, pairs of a name in data.mixture and a
    # weight). A source that a phase does not name has none there.
    config.data.phases = key((), pairs)
    # Times that the steps of the run may take a source's tokens, on average; more is refused. 0: any number.
    config.data.max_epochs = key(0.0, at_least(0))
    # How documents are put into sequences: "concatenate", one after another, cut where a sequence ends; "best_fit",
    # arranged so that few are cut. Neither pads.
    config.data.packing = key("concatenate", choices(registry="data.batches.packing:PACKINGS"))
    config.data.sequence_length = key(0, at_least(1))  # tokens of a sequence
    config.data.batch_size = key(0, at_least(1))  # sequences of a step, over all devices
    config.data.grad_accum_steps = key(1, at_least(1))  # micro-batches of a step, computed one after another
    config.data.prefetch = key(1, at_least(0))  # batches made ahead, by a background thread; 0: none

    config.evaluation = ConfigDict()  # held-out losses while training
    config.evaluation.data = ""  # held-out corpus directories, commas between; "": no evaluation while training
    config.evaluation.every = key(0, at_least(0))  # steps between evaluations; the last step is always evaluated
    config.evaluation.batches = key(0, at_least(0))  # batches of each corpus; 0: all of it
    # Whether the output has the leaves of the evaluation with the lowest loss (mean of the corpora), not the last ones.
    config.evaluation.keep_best = False
    # With keep_best: consecutive evaluations without a lower loss that end the run; 0: it takes all steps.
    config.evaluation.patience = key(0, at_least(0))

    config.optimizer = ConfigDict()  # AdamW, on trainable leaves alone
    config.optimizer.learning_rate = 9e-4  # peak
    # Steps of the linear warm-up from 0 to the peak; a run that is no longer warms up for half of its steps.
    config.optimizer.warmup_steps = key(0, at_least(0))
    config.optimizer.schedule = key("cosine", choices("cosine", "wsd"))  # "wsd": constant, then linear decay
    config.optimizer.decay_fraction = key(0.2, fraction)  # of all steps, the share that decays ("wsd")
    config.optimizer.final_fraction = key(0.1, fraction)  # of the peak, where the schedule ends
    config.optimizer.beta1 = key(0.9, at_least(0, below=1))  # decay of the mean of gradients, per step
    config.optimizer.beta2 = key(0.95, at_least(0, below=1))  # decay of the mean of squared gradients, per step
    config.optimizer.epsilon = 1e-8  # added to the root of the mean of squares
    config.optimizer.weight_decay = 0.0  # per step, times the learning rate
    # Patterns of whole paths of leaves that never decay.
    config.optimizer.no_decay = key((".*scale", ".*/router/.*", "embedding"), patterns)
    # Global norm of the gradient of trainable leaves to which it is clipped; 0: no clipping.
    config.optimizer.clip_norm = key(1.0, at_least(0))

    config.loss = ConfigDict()  # weights of the terms beside the cross-entropy, per token
    config.loss.z_loss = 1e-5  # squared log partition function of the logits
    config.loss.router_z_loss = 0.0  # the same of the router's logits, mean over layers
    config.loss.load_balancing = 0.0  # Switch Transformer's; top-k when routing is uniform

    config.mesh = ConfigDict()  # devices along each axis; one of them may be -1: all that are left
    config.mesh.data = -1  # copies of the parameters, each with its sequences of the batch
    config.mesh.fsdp = 1  # parameters sharded over devices that share the batch
    config.mesh.expert = 1  # stacked experts sharded, and all other parameters as over fsdp
    config.mesh.tensor = 1  # heads, hidden units and vocabulary sharded
    config.sharding_rules = key(SHARDING_RULES, pairs)  # logical axis -> mesh axes

    config.checkpoint = ConfigDict()  # what an interrupted run resumes from
    config.checkpoint.every = key(1000, at_least(1))  # steps between checkpoints; the last step is always saved
    config.checkpoint.keep = key(2, at_least(1))  # most recent checkpoints kept

    # How long the processes of a run wait for each other, seconds; a process alone waits for none.
    config.distributed = ConfigDict()
    config.distributed.start_timeout = key(300, at_least(1))  # until all have started
    config.distributed.heartbeat_timeout = key(30, at_least(5))  # without a sign of life, after which one is lost
    # Until all have come to the same point; longer than the slowest compilation, and than reading the data once.
    config.distributed.agreement_timeout = key(1800, at_least(1))

    config.faults = ConfigDict()  # what a run does when something goes wrong
    # Seconds after which a process that has not finished a step is ended, with the stacks of its threads; evaluation
    # and checkpoint count. 0: never.
    config.faults.step_timeout = key(1800.0, at_least(0))
    # Consecutive steps that may be skipped, their gradient not being finite, or far above the others; with the next one
    # the run stops, and its state is saved. 0: it stops at once, and is not.
    config.faults.skip_steps = key(0, at_least(0))
    # A step is also skipped if its loss or gradient norm is that many standard deviations above the mean of the last
    # 128 steps. 0: only if it is not finite.
    config.faults.spike = key(0.0, at_least(0))

    config.log = ConfigDict()  # metrics of training steps
    config.log.every = key(10, at_least(1))  # steps between lines of metrics.jsonl and TensorBoard points
    config.log.by_layer = True  # the share of each expert and the router's entropy in each layer too
    config.log.wandb = ""  # project of Weights & Biases that gets the same, if that is installed; "": none

    config.profile = ConfigDict()  # a trace of some steps, for xprof, in WORKDIR/profile
    config.profile.first = key(0, at_least(0))  # step that it begins with; 0: none
    config.profile.steps = key(3, at_least(1))  # how many are traced

    config.publish = ConfigDict()  # what goes into the output besides weights
    # Documents of data.train shipped with an anchor, for owners to mix in.
    config.publish.public_documents = key(0, at_least(0))

    # Selector whose statistics of data.train are shipped, so that a merge can choose experts by them; "": none.
    config.publish.selector = key("ngram", choices("", registry="model.selectors:SELECTORS"))

    # Weight of what was trained in the expert that is shipped; the rest of its feed-forward is the anchor's. Below 1
    # the expert does less harm to text that is not its owner's (docs/method.md, "Interpolation with the anchor").
    config.publish.interpolation = key(1.0, fraction)

    # Differential privacy of these statistics, per document (docs/privacy.md); it needs flexolmo-jax[privacy].
    # 0: statistics are exact; 1 to 8 are common, less is more private.
    config.publish.epsilon = key(0.0, at_least(0, below=100))
    # Probability with which epsilon does not hold; far below 1 / number of documents.
    config.publish.delta = key(1e-6, at_least(1e-10, below=0.1))
    # L2 norm of a document's n-gram counts above which they are scaled down to it. Noise grows with it; where it is
    # low, long documents count no more than short ones.
    config.publish.clip = key(8.0, at_least(1))

    config.card = ConfigDict()  # what a data owner says of the data; it travels with the weights
    config.card.description = ""  # in words
    config.card.license = ""  # under which the data may be used
    return config
