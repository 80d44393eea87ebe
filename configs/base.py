"""Every configuration key, once, with its default and its unit. The other configs change values only."""

from ml_collections import ConfigDict

# Where the dimensions of parameters and activations go: logical axis -> mesh axes.
SHARDING_RULES = (
    ("batch", ("data", "fsdp", "expert")),  # rows of a batch
    ("length", None),  # tokens of a row
    ("layers", None),  # the scanned axis
    ("embed", ("fsdp", "expert")),  # d_model of parameters that all experts share
    ("expert_embed", "fsdp"),  # d_model of an expert's
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),  # hidden units of an expert
    ("experts", "expert"),
)


def get_config() -> ConfigDict:
    """Returns the defaults: an untrained anchor of no particular size. Locked: an unknown key is an error."""
    config = ConfigDict()

    config.seed = 0  # of initialisation and of the order of the data
    config.steps = 0  # optimizer steps of the whole run
    # Model directory to start from (an owner's anchor, a coordinator's merge); "": fresh weights.
    config.start_from = ""
    config.expert = ""  # name of the expert to train against start_from; "": train the model itself
    # Ordered (regular expression of a leaf's whole path, "trainable" or "frozen"); the first match decides.
    config.partition = ((".*", "trainable"),)

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
    config.model.expert = "swiglu"  # kind of expert: a key of EXPERT_KINDS in flexolmo_jax/model/experts.py
    config.model.router = "linear"  # a key of ROUTERS in flexolmo_jax/model/routers.py

    config.moe = ConfigDict()  # of fresh weights, which `benchmark` and `plan` take; start_from brings its own
    config.moe.num_experts = 1  # stacked experts, the anchor included; 1: none to route between
    config.moe.top_k = 1  # experts that compute each token

    config.init = ConfigDict()  # of fresh weights, and of a new expert's leaves beside its copy of the anchor's
    config.init.embedding_stddev = 0.02  # of fresh embeddings; every other matrix has 0.02
    config.init.router_weight_file = ""  # .npy of [d_model] or [layers, d_model]: a new expert's; "": truncated normal
    config.init.router_weight_stddev = 0.002  # of a new expert's truncated normal
    config.init.router_bias = -0.1  # b of every layer; its effect on the logit is -|b|, and at exactly 0 it stays 0

    config.compute = ConfigDict()  # how steps are computed
    config.compute.dtype = "float32"  # activations and matmuls: "float32" or "bfloat16"
    config.compute.frozen_dtype = "float32"  # how frozen leaves are held in memory
    # What the backward pass computes again, the later the more: "none", "dots" (all but matmuls, attention and stacked
    # experts), "feed_forward" (all but the feed-forward's, attention and stacked experts), "kernels" (all but the
    # latter two; of experts on a CPU, all but their sums), "full".
    config.compute.remat = "none"
    # Which kernels compute; "auto" goes by the devices, and most are for devices of one kind.
    config.compute.attention = "auto"  # a key of flexolmo_jax/model/kernels/causal_attention.py's KERNELS
    config.compute.dispatch = "auto"  # of tokens to stacked experts: a key of flexolmo_jax/model/dispatch.py's DISPATCH
    config.compute.unroll = 1  # blocks per iteration of the scan over layers

    config.data = ConfigDict()  # what is trained on, and in which batches
    config.data.train = ""  # corpus directory, or several with commas between
    config.data.public_share = 0.0  # share of rows drawn from public data instead of data.train
    config.data.public = ""  # corpus directory of public data; "": the sample that came with start_from
    config.data.sequence_length = 0  # tokens in a row
    config.data.batch_size = 0  # rows in a step, over all devices
    config.data.grad_accum_steps = 1  # parts a step's rows are computed in, one after another

    config.evaluation = ConfigDict()  # held-out losses while training
    config.evaluation.data = ""  # held-out corpus directories, commas between; "": no evaluation while training
    config.evaluation.every = 0  # steps between evaluations; the last step is always evaluated
    config.evaluation.batches = 0  # batches of each corpus; 0: all of it

    config.optimizer = ConfigDict()  # AdamW, on trainable leaves alone
    config.optimizer.learning_rate = 9e-4  # peak
    # Steps of the linear rise from 0 to the peak; in a run that is not longer than that, half of its steps.
    config.optimizer.warmup_steps = 0
    config.optimizer.schedule = "cosine"  # "cosine", or "wsd": constant, then linear decay
    config.optimizer.decay_fraction = 0.2  # of all steps, the share that decays ("wsd")
    config.optimizer.final_fraction = 0.1  # of the peak, where the schedule ends
    config.optimizer.beta1 = 0.9  # decay of the mean of gradients, per step
    config.optimizer.beta2 = 0.95  # decay of the mean of squared gradients, per step
    config.optimizer.epsilon = 1e-8  # added to the root of the mean of squares
    config.optimizer.weight_decay = 0.0  # per step, times the learning rate
    config.optimizer.no_decay = (".*scale", ".*/router/.*", "embedding")  # patterns of paths that never decay
    config.optimizer.clip_norm = 1.0  # global norm of the gradient of trainable leaves; 0: no clipping

    config.loss = ConfigDict()  # weights of the terms beside the cross-entropy, per token
    config.loss.z_loss = 1e-5  # squared log partition function of the logits
    config.loss.router_z_loss = 0.0  # the same of the router's logits, mean over layers
    config.loss.load_balancing = 0.0  # Switch Transformer's; top-k when routing is uniform

    config.mesh = ConfigDict()  # devices along each axis; one of them may be -1: all that are left
    config.mesh.data = -1  # copies of the parameters, each with its rows of the batch
    config.mesh.fsdp = 1  # parameters split over rows' devices
    config.mesh.expert = 1  # stacked experts split over devices, and what they share as over fsdp
    config.mesh.tensor = 1  # heads, hidden units and vocabulary split
    config.sharding_rules = SHARDING_RULES  # logical axis -> mesh axes

    config.checkpoint = ConfigDict()  # what an interrupted run goes on from
    config.checkpoint.every = 1000  # steps between checkpoints; the last step is always saved
    config.checkpoint.keep = 2  # most recent checkpoints kept

    config.log = ConfigDict()  # metrics of training steps
    config.log.every = 10  # steps between lines of metrics.jsonl and TensorBoard points

    config.publish = ConfigDict()  # what goes into the product besides weights
    config.publish.public_documents = 0  # documents of data.train shipped with an anchor, for owners to mix in

    config.card = ConfigDict()  # what a data owner says of the data; it travels with the weights
    config.card.description = ""  # in words
    config.card.license = ""  # under which the data may be used
    return config.lock()
