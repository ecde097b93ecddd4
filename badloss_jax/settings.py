"""Every setting with its default and its meaning; the paper's where the paper has one.

Groups are flat; a group is hashed into the phases whose result it can change.
"""

from ml_collections import ConfigDict

RECORDED_KINDS = ("step", "prob", "logits", "ranked", "features")  # beside the loss, which always is
KINDS = ("loss", *RECORDED_KINDS, "combined")
RULES = ("fraction", "alpha", "fdr", "clusters")
WRITERS = ("tensorboard", "wandb")
CONTROLS = ("none", "random", "oracle")  # "none", the undefended network, is trained with every other


def default_config() -> ConfigDict:
    """Returns every key at its default: the paper's settings where the paper has one."""
    config = ConfigDict()
    config.seed = 0  # poison, probes, initial weights, order of examples, augmentation
    config.controls = ("random", "oracle")  # models trained beside the undefended and the defended ones
    config.data = {
        "source": "digits",  # digits | idx | image_folder | gtsrb | arrays | tfds
        "dir": "",  # the folder where the source's files lie (arrays: the .npz file)
        "cache_dir": "~/.cache/badloss_jax",  # decoded images (tfds: labels), keyed by content; "" keeps no cache
        "train_examples": 0,  # draw so many training examples (seeded by `seed`); 0 = all
        "test_examples": 0,
        "pad": 0,  # zero pixels added on each side
        "image_size": 0,  # image_folder, gtsrb, tfds: resize to this many pixels a side; 0 = as they are
        "channels": 3,  # image_folder, gtsrb, tfds: 3 (RGB) or 1 (grey)
        "skip_corrupt": False,  # image_folder, gtsrb: leave unreadable files out, and count them
        "class_names": (),  # in the order of the labels; () takes the source's own
        # resident: all training images on every device | streamed: decoded by the hosts as they are needed | auto:
        # streamed if the images take more than 2 GiB
        "input": "auto",
        "workers": 0,  # streamed: processes a host that decode; 0 = threads of the run's own process
        "threads": 16,  # streamed: that decode, in each of these processes
    }
    config.attacks = {
        "names": ("patch", "single_pix", "blend_r", "blend_p", "sinusoid", "frequency"),
        "manifest": "",  # a manifest.json to take the poison from, instead of drawing it
        "overlap": 0.0,  # share of each attack's images that carry the trigger of another attack, too, below its own
        "scale": 1.0,  # multiplies the ratio of every attack; 0 poisons nothing
        # ratio: share of the training set (sinusoid: of its target class); target: a class, or -1 to draw it
        "patch": {"ratio": 0.01, "target": -1},
        "single_pix": {"ratio": 0.01, "target": -1},
        "blend_r": {"ratio": 0.01, "target": -1, "strength": 0.075},
        "blend_p": {"ratio": 0.01, "target": -1, "strength": 0.025},
        "sinusoid": {
            "ratio": 0.1,
            "target": -1,
            "strength": 0.075,
            "cycles": 6.0,
            "min_images": 0,  # poison at least so many images of the target class
            "min_class": 0,  # draw the target among the classes of at least so many images
        },
        "frequency": {"ratio": 0.01, "target": -1, "magnitude": 30.0},
        "narcissus": {  # its ratio is a share of its target class, too
            "ratio": 0.005,
            "target": 2,
            "strength": 1.0,  # multiple of the perturbation
            "epsilon": 16,  # largest change of a pixel, in 1/255
            "surrogate": "resnet_small",  # the network that the perturbation is optimised on
            "surrogate_epochs": 15,
            "steps": 300,  # of projected gradient descent
        },
    }
    config.probes = {
        "count": 250,  # P, known-clean training examples
        "contaminated": 0.0,  # share of them that are in truth poisoned, an ablation
    }
    config.model = {
        "name": "resnet18",  # resnet_small | resnet18 | resnet34 | resnet50 | vgg16_bn | mobilenet_v2
        "stages": (16, 32, 64),  # resnet_small: channels of each stage, one block a stage
        "stem_stride": 2,  # resnet_small
        "dtype": "float32",  # of the computation: float32 | bfloat16 | float64 (needs JAX_ENABLE_X64=1)
    }
    config.optimizer = {
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,  # decoupled, on every parameter
        "b1": 0.9,
        "b2": 0.999,
        "loss_clamp": 100.0,  # per-example loss at most this before the mean
    }
    config.recording = {
        "epochs": 30,  # T
        "schedule_epochs": 100,  # length of the cosine that the T epochs are the start of
        "batch_size": 128,
        "capture": "sweep",  # sweep: one evaluation pass after each epoch | step: the training step's own losses
        # beside the loss, which is always recorded; "step" is the training step's own loss in a recording that sweeps
        "kinds": ("prob", "logits", "ranked", "features"),
        "feature_dim": 64,  # d of the Gaussian projection of the penultimate features
        "ranked_others": 5,  # m, how many of the other classes' log-probabilities
    }
    config.scoring = {
        "kinds": ("loss", "logits", "ranked", "features", "combined"),
        "epochs": 0,  # score the first so many of the recorded epochs; 0 = all
        "loss": {"k": 50},  # probes in the mean distance
        "step": {"k": 50},
        "prob": {"k": 50},
        "logits": {"k": 5},
        "ranked": {"k": 5},
        "features": {"k": 5},
        "combined": {"k": 0},  # 0 = features and ranked each at its own k
        # compare classes with their own: a hard or small one is not suspicious as a whole (scoring/README.md)
        "by_class": False,
        "transform": "log",  # of the score that is shown: log | linear; ranks are the same
    }
    config.rejection = {
        # applied to every kind; RULE@LEVEL, such as "fraction@0.1", takes another level than below. "clusters", beside
        # these: what is in attacks (scoring/README.md), whatever the kind; for features and ranked
        "rules": ("fraction", "alpha", "fdr"),
        "fraction": 0.4,  # remove this share of all examples (the paper's rule)
        # remove p <= alpha: this share of the clean data is lost, give or take sqrt(alpha (1 - alpha) / P), and more
        # where probes and examples are not quite exchangeable
        "alpha": 0.1,
        "fdr": 0.1,  # Benjamini-Hochberg at this false discovery rate
    }
    config.defenses = {  # their papers' settings, as in the authors' program
        "names": (),  # beside what `scoring.kinds` says: of `badloss_jax.defenses.DEFENSES`
        "neural_cleanse": {
            "epochs": 15,  # of optimising each class's mask and pattern
            "steps": 50,  # of an epoch, each on `batch_size` probes; after it the mask's penalty is adapted
            "batch_size": 32,
            "learning_rate": 0.1,  # of Adam
            "penalty": 1e-3,  # weight of the mask's L1 norm, to begin with
            "flipped_share": 0.99,  # of the probes that a mask and its pattern must flip
            "anomaly": 2.0,  # classes of small masks are attacked from this index on
            "unit_share": 0.01,  # of the penultimate units, those that the pattern raises most, at least one
            "probe_share": 0.05,  # of the probes that the threshold would remove, shared by the attacked classes
        },
        "activation_clustering": {
            "components": 10,  # of the independent component analysis
            "silhouette": 0.15,  # a class above it is attacked
            "cluster_share": 0.5,  # if its smaller cluster is no larger than this share of it, too; 0.5 always is
            "sample_size": 2500,  # examples of each cluster, at most, that the silhouette is of
        },
        "spectral_signatures": {
            "eps": 0.1,  # the share of each class that is thought to be poisoned
        },
        "frequency_analysis": {
            "epochs": 10,  # of the detector's training
            "learning_rate": 0.05,  # of its Adadelta, constant
            "weight_decay": 1e-4,
            "batch_size": 32,
            "threshold": 0.5,  # remove what is altered with this probability
        },
        "abl": {
            "epochs": 10,  # of training with flooding
            "flooding": 0.5,  # the level that the loss is held at
            "fraction": 0.15,  # remove this share, of the lowest losses
        },
        "cognitive_distillation": {
            "steps": 100,  # of optimising each image's mask
            "learning_rate": 0.1,  # of its Adam
            "l1_weight": 0.01,  # of the sum of the mask
            "variation_weight": 1.0,  # of its total variation
            "fraction": 0.15,  # remove this share, of the smallest masks
        },
        "cbd": {
            "backdoor_epochs": 5,  # of the network that is to learn the triggers
            "penalty": 0.01,  # weight of what the features tell about that network's
        },
        "pss": {
            "early_epochs": 2,  # of the network whose features are compared
            "clean_quantile": 0.8,  # of the feature inconsistency: below it, examples are called clean
            "poisoned_quantile": 0.95,  # and above it poisoned
            "epochs": 20,  # of unlearning the ones and relearning the others, in turns
            "learning_rate": 1e-4,  # of both
        },
    }
    config.retraining = {
        "enabled": True,  # False: detect only, train nothing that shows what a removal does
        "epochs": 100,
        "batch_size": 128,
        # none | crop_flip (reflect-pad 4, random crop, random flip) | resized_crop_flip (of 8 to 100 % of the area)
        "augment": "none",
        # of each model to retrain: kind/rule, or defence/rule ("own" is the rule that a defence brings along)
        "variants": ("loss/fraction", "logits/fraction", "combined/fraction"),
    }
    config.evaluation = {
        "batch_size": 500,
        "max_triggered": 10_000,  # test images per attack
        "boost": 2.0,  # how much stronger the "boosted" trigger is
    }
    config.checkpoint = {  # of a training on its way, beside what is kept of finished ones
        "every_steps": 0,  # save after so many steps; 0 does not count steps
        "every_minutes": 10.0,  # or after so many minutes; 0 does not count minutes
        "stall_minutes": 30.0,  # end with every thread's stack if no step ends for so long; 0 waits for ever
    }
    config.report = {
        "gallery": 60,  # highest-ranked images to keep for report.html, of each kind
        "writers": (),  # of what metrics.jsonl gets, too: "tensorboard", "wandb"
    }
    return config.lock()
