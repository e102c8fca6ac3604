"""The sizes of the study: `smoke` (CI, minutes), `workshop` (a laptop, the default) and `paper` (GPUs, as far as published)."""

from dataclasses import dataclass, replace

from sae_lib.activations import StreamConfig
from sae_lib.corpus import CorpusConfig
from sae_lib.tokens import TokenConfig
from sae_lib.toy import ToyConfig
from sae_lib.toy_features import FeatureConfig
from sae_lib.train import TrainConfig
from sae_lib.transformer import TransformerConfig


@dataclass(frozen=True)
class ToySizes:
    """Sizes of notebook 01: toy models of superposition, and dictionaries on activations of known features."""

    crowd: ToyConfig = ToyConfig(n_features=20, n_hidden=5)
    plane: ToyConfig = ToyConfig(n_features=5, n_hidden=2, restarts=4)
    pair: ToyConfig = ToyConfig(n_features=2, n_hidden=1, n_steps=1000, batch_size=256, restarts=4)
    n_densities: int = 10  # from features that are always there to features in 1 of 100 draws
    pair_grid: tuple[int, int] = (13, 11)  # densities and importances
    starts: int = 3  # trainings of each toy model, and truths that dictionaries are trained on
    truth: FeatureConfig = FeatureConfig()
    widths: tuple[float, ...] = (0.5, 0.75, 0.9, 0.95, 1.0, 1.05, 1.1, 1.5, 2.0)  # of dictionaries, in true numbers of features
    l1: tuple[float, ...] = (0.1, 0.35, 0.7, 1.4)
    main_l1: float = 0.7
    # Of tiny matrices bfloat16 saves no time.
    training: TrainConfig = TrainConfig(n_activations=600_000, batch_size=512, lr=4e-3, lr_warmup=0.05, lr_decay=0.5,
                                        birth_density=0.05, resample_inputs=8192, precision="float32")
    test_rows: int = 4096


@dataclass(frozen=True)
class DeepSizes:
    """Sizes of notebooks 11 and 12: transformers of several layers, and dictionaries on their residual stream."""

    transformer: TransformerConfig = TransformerConfig(n_tokens=7_000_000, n_layers=3)
    # The one for notebook 11, with names in its vocabulary besides; see `ioi.training_contexts` for the short contexts.
    with_names: TransformerConfig = TransformerConfig(n_tokens=8_000_000, n_layers=3, n_ctx=34, batch_contexts=128)
    dictionary: TrainConfig = TrainConfig(n_activations=4_000_000, batch_size=2048, l1_coefficient=2.0, lr=1e-3, lr_warmup=0.01,
                                          lr_decay=0.4, birth_density=0.005, resample_inputs=131_072)
    # Of the model with names: chosen for how few features its development exchanges take (`IdentificationSizes`).
    names_dictionary: TrainConfig = TrainConfig(n_activations=4_500_000, batch_size=2048, l1_coefficient=4.0, lr=1e-3,
                                                lr_warmup=0.01, lr_decay=0.4, birth_density=0.005, resample_inputs=65_536)
    expansion: int = 8  # features per dimension of the residual stream
    case_text: int = 2048  # contexts of test text in which the chosen features are measured
    case_contexts: int = 96  # contexts with what a feature is for, in which edits are compared
    case_places: int = 400  # tokens at which effects on the logits are averaged
    tree_branches: tuple[int, ...] = (4, 3)  # causes that are drawn of the target, and of each of these
    tree_places: int = 20  # contexts that rank causes, and as many others that measure them
    surveyed: int = 12  # features of each layer whose causes are looked for


@dataclass(frozen=True)
class FrontierSizes:
    """Sizes of notebook 10: dictionaries of every kind, all trained on one harvest and measured on the same text."""

    training: TrainConfig = TrainConfig(n_activations=500_000, batch_size=1024, lr_warmup=0.02, lr_decay=0.4,
                                        birth_density=0.005, resample_inputs=16_384, log_every=20)
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)  # learning rates that each kind tries
    trial_activations: int = 250_000
    trial_l1: float = 3.5
    l1: tuple[float, ...] = (1.5, 2.5, 4.0, 6.0, 9.0)  # of kinds with an L1 penalty on activations
    gate_l1: tuple[float, ...] = (3.0, 6.0, 10.0, 16.0)  # of gated ones, whose penalty is on the gates
    l0: tuple[int, ...] = (10, 30, 60)  # of kinds that are told how many features are to be active
    matched_l0: int = 30  # at which every kind is trained from several seeds
    seeds: int = 3
    widths: tuple[int, ...] = (2, 4)  # features per neuron, besides those of the main dictionary
    contexts: int = 256  # of held-out text
    units: int = 128  # features of each kind that are explained
    fault_expansion: int = 4  # of the broken training runs
    fault_training: TrainConfig = TrainConfig(n_activations=300_000, batch_size=1024, lr=1e-3, l1_coefficient=4.0, lr_warmup=0.02,
                                              lr_decay=0.4, birth_density=0.005, resample_inputs=16_384, log_every=4)


@dataclass(frozen=True)
class OwnSizes:
    """Sizes of notebook 13: of a model that was trained elsewhere. A dictionary that is trained here has `DeepSizes`' recipe."""

    n_tokens: int = 3_000_000  # of the corpus, by that model's tokenizer
    n_ctx: int = 256
    n_activations: int = 2_000_000  # that a dictionary is trained on
    held_out_contexts: int = 256
    prompts: int = 128  # for steering


@dataclass(frozen=True)
class IdentificationSizes:
    """Sizes of notebook 11: sentences of the task, and exchanges of one name in them for another."""

    prompts: int = 1000  # for the accuracy, of each kind
    sentences: int = 20  # of one exchange, to find an order on, and as many to measure it on
    sentences_of_many: int = 50  # of many exchanges together, as in the paper
    exchanges: int = 8  # that are measured one at a time
    dev_exchanges: int = 3  # on which the layer is chosen
    growth: tuple[tuple[int, int], ...] = ((2, 2), (5, 2), (15, 1), (25, 1))  # exchanges in a set, and sets
    layers: tuple[int, ...] = (1, 2)  # after which is patched
    l1: tuple[float, ...] = (8.0, 4.0, 2.0, 0.0)
    thresholds: tuple[float, float, int] = (-4.0, 0.5, 12)  # of the order: powers of ten from, to, and how many
    most: int = 256  # directions that are patched


@dataclass(frozen=True)
class PretrainedSizes(OwnSizes):
    """Sizes of notebook 11 for a model that was trained elsewhere; its dictionaries have `DeepSizes`' recipe besides."""

    model: str = ""  # a folder, or hf:NAME; "": none, but the study's own with names
    expansion: int = 4  # features per dimension of the residual stream, as in the paper
    l1_coefficient: float = 1.0


@dataclass(frozen=True)
class Profile:
    """Every size and hyperparameter of one scale of the study."""

    name: str
    corpus: CorpusConfig
    tokens: TokenConfig
    transformer: TransformerConfig
    stream: StreamConfig
    dictionary: TrainConfig
    expansion: int  # features of the main dictionary per neuron; the paper's A/1 has 8
    correction_activations: int  # on which the shrinkage of the main dictionary is measured
    sweep: TrainConfig  # a short training, for comparing L1 coefficients at equal budget
    sweep_l1: tuple[float, ...]
    widths: tuple[int, ...]  # features per neuron of the dictionaries that are compared, from narrow to wide
    width_training: TrainConfig  # the same for each of them
    held_out_contexts: int  # contexts of the test split that are evaluated
    scored_contexts: int  # about so many of them are looked at for explaining units
    scored_units: int  # units of each kind that are explained
    component_sample: int  # activations that PCA and ICA are fitted to
    bootstrap: int  # draws
    toy: ToySizes = ToySizes()
    deep: DeepSizes = DeepSizes()
    frontier: FrontierSizes = FrontierSizes()
    own: OwnSizes = OwnSizes()
    identification: IdentificationSizes = IdentificationSizes()
    pretrained: PretrainedSizes = PretrainedSizes()

    @property
    def d_sae(self) -> int:
        return self.expansion * self.transformer.d_mlp


WORKSHOP = Profile(
    name="workshop",
    corpus=CorpusConfig(target_tokens=46_000_000),
    tokens=TokenConfig(vocab_size=4096, n_ctx=256),
    transformer=TransformerConfig(n_tokens=40_000_000),
    stream=StreamConfig(),
    # Many small steps: a dictionary gets better with steps as much as with activations.
    dictionary=TrainConfig(n_activations=18_000_000, batch_size=2048, l1_coefficient=3.2, lr=1e-3, lr_warmup=0.01, lr_decay=0.4,
                           birth_density=0.005, resample_inputs=131_072),
    expansion=8,
    correction_activations=131_072,
    sweep=TrainConfig(n_activations=2_000_000, batch_size=2048, l1_coefficient=4.0, lr=1e-3, lr_warmup=0.01, lr_decay=0.3,
                      birth_density=0.005, resample_inputs=131_072),
    sweep_l1=(2.0, 4.0, 9.0, 18.0),
    widths=(1, 8, 32),
    width_training=TrainConfig(n_activations=3_000_000, batch_size=2048, l1_coefficient=3.0, lr=1e-3, lr_warmup=0.01,
                               lr_decay=0.4, birth_density=0.005, resample_inputs=131_072),
    held_out_contexts=1536,
    scored_contexts=768,
    scored_units=512,
    component_sample=32_768,
    bootstrap=1000,
)

SMOKE = replace(
    WORKSHOP,
    name="smoke",
    corpus=CorpusConfig(target_tokens=1_200_000),
    tokens=TokenConfig(vocab_size=1024, n_ctx=64),
    transformer=TransformerConfig(n_tokens=500_000, d_vocab=1024, n_ctx=64, d_model=64, n_heads=2, d_mlp=128),
    stream=StreamConfig(tokens_per_context=62),
    dictionary=TrainConfig(n_activations=400_000, batch_size=512, l1_coefficient=5.0, lr=1e-3, birth_density=0.01,
                           resample_inputs=8192),
    correction_activations=8192,
    sweep=TrainConfig(n_activations=100_000, batch_size=512, l1_coefficient=3.0, lr=1e-3, birth_density=0.01,
                      resample_inputs=8192),
    sweep_l1=(3.0, 8.0),
    widths=(1, 2, 4),
    width_training=TrainConfig(n_activations=80_000, batch_size=512, l1_coefficient=3.0, lr=1e-3, birth_density=0.01,
                               resample_inputs=8192),
    held_out_contexts=128,
    scored_contexts=128,
    scored_units=16,
    component_sample=2048,
    bootstrap=200,
    toy=ToySizes(
        crowd=ToyConfig(n_features=8, n_hidden=2, n_steps=200, batch_size=128),
        plane=ToyConfig(n_features=5, n_hidden=2, n_steps=200, batch_size=128),
        pair=ToyConfig(n_features=2, n_hidden=1, n_steps=200, batch_size=64, restarts=2),
        n_densities=4, pair_grid=(5, 3), truth=FeatureConfig(d_in=8, n_features=12, active=1.5), widths=(0.75, 1.0, 1.5),
        l1=(0.2, 0.7), test_rows=1024,
        training=TrainConfig(n_activations=32_000, batch_size=256, lr=1e-2, lr_warmup=0.05, lr_decay=0.5, birth_density=0.05,
                             resample_inputs=1024, precision="float32")),
    deep=DeepSizes(
        transformer=TransformerConfig(n_tokens=300_000, n_layers=3, d_vocab=1024, n_ctx=64, d_model=64, n_heads=2, d_mlp=128),
        with_names=TransformerConfig(n_tokens=200_000, n_layers=3, n_ctx=48, d_model=64, n_heads=2, d_mlp=128),
        dictionary=TrainConfig(n_activations=80_000, batch_size=512, l1_coefficient=1.0, lr=1e-3, birth_density=0.01,
                               resample_inputs=8192),
        names_dictionary=TrainConfig(n_activations=60_000, batch_size=512, l1_coefficient=1.0, lr=1e-3, birth_density=0.01,
                                     resample_inputs=8192), expansion=4,
        case_contexts=8, case_places=40, tree_branches=(2, 2), tree_places=6, surveyed=2),
    frontier=FrontierSizes(
        training=TrainConfig(n_activations=16_384, batch_size=256, lr_decay=0.4, birth_density=0.02, resample_inputs=1024,
                             log_every=4),
        rates=(1e-3, 3e-3), trial_activations=8192, l1=(2.0, 8.0), gate_l1=(4.0, 16.0),
        l0=(10, 30), seeds=2, widths=(2,), contexts=32,
        units=8, fault_expansion=2,
        fault_training=TrainConfig(n_activations=16_384, batch_size=256, lr=1e-3, l1_coefficient=4.0, lr_decay=0.4,
                                   birth_density=0.02, resample_inputs=1024, log_every=2)),
    own=OwnSizes(n_tokens=300_000, n_ctx=64, n_activations=50_000, held_out_contexts=64, prompts=16),
    identification=IdentificationSizes(prompts=60, sentences=4, sentences_of_many=8, exchanges=2, dev_exchanges=2,
                                       growth=((2, 1), (3, 1)), layers=(1,), l1=(1.0, 0.0), thresholds=(-2.0, 0.0, 2), most=24),
)

PAPER = replace(
    WORKSHOP,
    name="paper",
    corpus=CorpusConfig(source="hf:monology/pile-uncopyrighted", target_tokens=100_000_000_000),
    tokens=TokenConfig(vocab_size=65_536, n_ctx=1024),
    transformer=TransformerConfig(n_tokens=100_000_000_000, d_vocab=65_536, n_ctx=1024, batch_contexts=512, lr=1e-3),
    stream=StreamConfig(),
    # 0.004 against the mean squared error over 512 neurons is 2.05 against the summed one.
    dictionary=TrainConfig(n_activations=8_192_000_000, batch_size=8192, l1_coefficient=2.05),
    correction_activations=819_200,
    sweep=TrainConfig(n_activations=800_000_000, batch_size=8192, l1_coefficient=2.05, birth_density=0.005),
    sweep_l1=(1.0, 2.05, 4.0),
    widths=(1, 8, 32, 256),
    width_training=TrainConfig(n_activations=8_192_000_000, batch_size=8192, l1_coefficient=2.05),
    held_out_contexts=16_384,
    scored_contexts=4096,
    scored_units=150,
    component_sample=1_000_000,
    # The sizes of Cunningham et al.'s toy data.
    toy=ToySizes(truth=FeatureConfig(d_in=256, n_features=512, active=5.0),
                 training=replace(ToySizes.training, n_activations=16_000_000, batch_size=4096, lr=1e-3)),
    frontier=FrontierSizes(
        training=TrainConfig(n_activations=20_000_000, batch_size=4096, lr_warmup=0.01, lr_decay=0.2, birth_density=0.005),
        trial_activations=4_000_000, contexts=1536, units=150,
        fault_training=replace(FrontierSizes.fault_training, n_activations=4_000_000)),
    own=OwnSizes(n_tokens=500_000_000, n_ctx=1024, n_activations=200_000_000, held_out_contexts=2048, prompts=1024),
    # The paper's layer 11 is what lies after 12 of Pythia-410M's 24. Its coefficients 1e-3, 3e-4, 1e-4 and 0 go with a squared
    # error averaged over 1,024 dimensions: against the summed one they are 1,024 times as large. Its activations are not scaled,
    # which would be another factor, 32 over their mean norm; that is not known before there is the model, and left at 1.
    identification=IdentificationSizes(sentences=50, growth=((2, 2), (5, 2), (10, 1), (25, 1)), layers=(8, 12, 16),
                                       l1=(1.024, 0.3072, 0.1024, 0.0), thresholds=(-5.0, 0.0, 50), most=1024),
    pretrained=PretrainedSizes(model="hf:EleutherAI/pythia-410m-deduped", n_tokens=10_000_000, n_activations=7_000_000,
                               l1_coefficient=1.024),
)

PROFILES = {profile.name: profile for profile in (SMOKE, WORKSHOP, PAPER)}
