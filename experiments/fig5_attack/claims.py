"""The claims and checks of Figure 5, and the differences between our run and the authors'."""

from experiments.harness.claims import RELEASED, Check, Claim, Published, Sample
from experiments.harness.claims import STAND_IN as OTHER_IMAGES

_HERE, _THERE = ("standard",), ("paper",)
_KODA = "section 5.2; fig5_attack_multiple.ipynb"
# With 1, 2 and 10 poisons, the paper flips 335, 455 and 590 of 591 test images. The uncertainty is
# two binomial standard errors.
_FLIPPED = {
    1: Published("section 5.2: 335 of 591 images", 0.567, 0.041),
    2: Published("section 5.2: 77 % of 591 images", 0.77, 0.035),
    10: Published("section 5.2: 590 of 591 images", 0.998, 0.004),
}
# The uncertainty is two binomial standard errors over 600 images.
_ACCURACY = Published("section 5.2: 591 of 600 images", 0.985, 0.01)


def _flips(network: str, name: str, presets: tuple[str, ...]) -> list[Claim]:
    return [
        Claim(
            f"paper_flipped_{count}_{network}",
            f"Share of test images that {count} poisoned training image{'s' * (count > 1)} or "
            f"fewer flip, by the paper's rule, {name}",
            published,
            sample=Sample("share", f"num_attacked_{network}"),
            presets=presets,
            headline=f"Figure 5: share of test images flipped by 1, 2 and 10 poisons, {name}",
        )
        for count, published in _FLIPPED.items()
    ]


def _group_claims() -> list[Claim]:
    """Return the claims about the attack on thirty test images, for each of the two heads."""
    one_flips = (
        "Figure 5: of 30 test images, those that one poison flips, Inception v3 and MobileNet"
    )
    return [
        Claim(
            f"group_{metric}_{network}",
            f"{sentence}, {name}",
            Published(_KODA, value, kind=RELEASED),
            presets=_HERE,
            headline=headline,
        )
        for metric, sentence, value, headline in (
            ("one_flipped", "Of 30 test images, those that one poisoned training image flips", 16,
             one_flips),
            ("poisons_for_most", "Poisoned training images that flip half of 30 test images", 1,
             ""),
            ("one_loss_before", "Mean loss of the 30 images before the attack", 0.0350197, ""),
            ("one_loss_after", "Mean loss of the 30 images, one image poisoned", 1.35992, ""),
            ("one_train_accuracy", "Training accuracy after the attack", 0.999444, ""),
            ("one_rank_in_loss", "Training images with a larger loss than the poison's", 0, ""),
        )
        for network, name in (("inception", "Inception v3 to mixed4"), ("mobilenet", "MobileNet"))
    ]  # fmt: skip


CLAIMS = (
    *_flips("inception", "Inception v3 to mixed4", _HERE),
    *_flips("mobilenet", "MobileNet", _HERE),
    *_flips("inception-keras", "Inception v3", _THERE),
    *_group_claims(),
    Claim(
        "gain_from_1_to_10_by_papers_rule",
        "Share flipped with ten images minus share flipped with one, the paper's rule, all heads",
        Published("section 5.2", 0.431),
        presets=("standard", "paper"),
    ),
    Claim(
        "best_flipped_10_mobilenet",
        "Share flipped with ten images or fewer by our rule, MobileNet",
        None,
        0.95,
        1.0,
        presets=_HERE,
    ),
    Claim(
        "best_flipped_2_inception",
        "Share flipped with one or two images by our rule, Inception v3 to mixed4",
        None,
        0.40,
        1.0,
        presets=_HERE,
    ),
    Claim(
        "times_as_many_by_best_rule_with_2",
        "Images that our rule flips with two poisons, divided by those of the paper's rule",
        None,
        1.5,
        None,
        presets=_HERE,
    ),
    Claim(
        "times_as_many_by_best_rule_with_2_mobilenet",
        "The same for MobileNet, where not every image is flipped",
        None,
        1.5,
        None,
        presets=_HERE,
    ),
    Claim(
        "group_half_flipped",
        "At every head, our rule flips half of the group",
        None,
        1.0,
        1.0,
        presets=_HERE,
    ),
    *(
        Claim(
            f"test_accuracy_{network}",
            f"Share of the test images that the head classifies correctly, {name}",
            _ACCURACY,
            sample=Sample("share", 600),
            presets=presets,
        )
        for network, name, presets in (
            ("mobilenet", "MobileNet", _HERE),
            ("inception", "Inception v3 to mixed4", _HERE),
            ("inception-keras", "Inception v3", _THERE),
        )
    ),
)
CHECKS = (
    Check("confirmed_by_cold_refit", 1.0, 1.0),
    Check("byte_equal", 1.0, 1.0),
    Check("worst_gradient_norm", 0.0, 1e-9),
    Check("heads_as_chosen", 1.0, 1.0, presets=_HERE),
)
CONDITIONS = {"standard": OTHER_IMAGES}
FINDING = (
    "the paper's rule flips a share of {paper_flipped_1_small} with one poison and of "
    "{paper_flipped_10_small} with ten"
)

DEVIATIONS = (
    "Photographs: we use English springer against tench. The paper uses all dogs against all "
    "fish. The paper's photographs are not available here. The numbers are not comparable image "
    "by image.",
    "Networks: we use MobileNet (width .75) and Inception up to mixed8. The paper uses "
    "Inception's pool features. The last layers of the paper's network are not available here.",
    "Head: its features are not standardised. A rule chooses the layer and the weight decay from "
    "the training images only (fig5_attack/heads.py, the arrays `choice_...`). The held-out "
    "accuracy must be within a standard error of the paper's .985. Among these heads, the rule "
    "takes the one whose training loss is nearest to the paper's .0040. The weight decay of the "
    "authors' code, 1e-3, gives training losses ten times as high here.",
    "Box: we let each pixel move by .49 of a level to each side, and compare every rounded byte "
    "with the original. The box of the authors' code is closed at .5. float32 goes slightly "
    "beyond it, so the poisons of the authors' code do not round to their originals.",
    "Paper's rule: we take 20 steps of .1 of a level (standard). The authors' code takes 100 "
    "steps of .02. On eight images at MobileNet and five at Inception, both needed the same "
    "number of poisons. `standard` tries 1, 2 and 10 poisons; the authors' code also tries 3 and "
    "5.",
    "Ranking: we compute the L1 norm of the derivative with respect to the pixels for 64 of the "
    "1,800 training images. These images have the largest derivative with respect to the "
    "features. The ten images with the largest L1 norms were at places up to 34 among the 64.",
    "Test images: we attack 60 (standard), drawn at random among those that the head classifies "
    "correctly. The paper attacks 591. Success with k poisons means success with k or fewer, "
    "because the authors' code stops at the first success. With one poison the rule has two "
    "tries.",
    "Best rule: it is not the paper's. Its steps decay and have momentum. Entries whose "
    "derivative is below half of the mean move in proportion to their derivative. Six training "
    "images are first moved one at a time. The most effective of these become poisons, and the "
    "others are ranked again at the new weights. If the poisons do not flip the image, the rule "
    "restarts elsewhere in the boxes. Its parameters were set after trials on eight of the test "
    "images at MobileNet and six at Inception.",
    "Success with two poisons: the best rule was to flip 1.5 times as many images as the paper's "
    "rule. Over both heads it flips fewer. At Inception a factor of 1.5 is impossible, because the "
    "paper's rule flips most of the 60 images.",
    "Group, not reproduced: in the paper one image flips 16 of 30. Here one image flips 1 of 30 at "
    "either head, and half of the group needs 32 (MobileNet) or 128 (Inception) images.",
    "Group, the images: we attack a test image and the 29 images of its class with the nearest "
    "features. The head classifies all of them correctly before the attack, and is surer of them "
    "than in the paper: their mean loss is .0008 and .0064, not .035. The authors' code uses 30 "
    "photographs of one dog. In trials with 30 images of a mean loss near .035, one image flipped "
    "0 to 4 of 30.",
    "Group, the poison: the authors' code takes the training image whose derivative with respect "
    "to the pixels has the largest L1 norm. That image was also the one of which their head was "
    "least sure. We take the image of the other class of which the head is least sure. At "
    "MobileNet the rule of the authors' code takes another image, which flips none.",
    "Group, the steps: the single poison takes 20 steps that decay (standard). The authors' code "
    "takes 2,000 steps of .005 of a level. The many poisons use the best rule without restarts.",
)
CAPTION = (
    "Four line plots of the attack's success: on single test images under two networks, how a "
    "defender finds the poisons, and on thirty test images at once. Above: the share of test "
    "images that are flipped by poisons in 1, 2 or 10 training images, by the paper's rule and by "
    "our best rule, with 95 % intervals. Crosses are the paper's results with its own network and "
    "photographs. Below, "
    "left: the share of the poisons that a defender finds, who checks the training images in the "
    "order of a score. Dotted lines show the same images before the attack. Below, right: the "
    "number of flipped images, of thirty, over the number of poisons. Open diamonds show one "
    "poison in the image of which the head is least sure. The paper flips 16 so (cross)."
)
