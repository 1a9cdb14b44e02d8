"""What the reports claim and publish, written down once more, apart from the experiments: made-up figures that a claim
holds for, and each of which can break it (0.5 for every other cell), and the published ones."""

from __future__ import annotations

from robustscale.experiments.base import Cell

LAMBDAS = ("0.1", "0.2", "0.4", "0.8", "1", "2", "3", "5")
BEST = "TRADES 3, then TRADES 5"
THREE = ("Rob, then Rob", BEST, "AdvReg 3, then AdvReg 5")
ROB, TRADES, ADV_REG = (f"{words}: RA, pretraining set" for words in ("Rob", "TRADES 5", "AdvReg 5"))
OAT = {
    (f"{words}, λ {lam}", column): value
    for lam in ("0", "0.1", "0.2", "0.3", "0.4", "1")
    for column in ("SA", "RA")
    for words, value in (("OAT", 0.6), ("dedicated", 0.4))
}

CLAIMS: dict[str, dict[Cell, float]] = {
    "thesis_4_1": {("λ 5", "RA"): 0.6, ("λ 5", "SA"): 0.4}
    | {(low, column): value for low in ("λ 0", "λ 0.1") for column, value in (("RA", 0.4), ("SA", 0.6))},
    "thesis_4_2": {
        (f"{words}, λ {lam}", "RA"): value for lam in LAMBDAS for words, value in (("AdvReg", 0.6), ("TRADES", 0.4))
    },
    **{f"thesis_5_{k}": {(BEST, "RA"): 0.6} for k in (1, 2, 3, 4)},
    "thesis_5_5": {
        (row, f"{name}, {size}"): value
        for row in THREE
        for name in ("SA", "RA")
        for size, value in (("180k", 0.6), ("50k", 0.4))
    },
    # At scale smoke tuning has two epochs.
    "thesis_fig_5_1": {(ROB, "0"): 0.6, (ROB, "2"): 0.4},
    "thesis_fig_5_2": {(ROB, "2"): 0.4, (TRADES, "2"): 0.6},
    "thesis_fig_5_3": {(ROB, "2"): 0.4, (ADV_REG, "2"): 0.6},
    "thesis_fig_5_4": {(ROB, "0"): 0.6, (ROB, "2"): 0.3, (TRADES, "2"): 0.6, (ADV_REG, "2"): 0.6},
    **dict.fromkeys(("oat_cifar10", "oat_svhn", "oat_stl10"), OAT),
    "biparo_table_1": {
        (row, column): value for column in ("ℓ∞ PGD", "ℓ2 PGD") for row, value in (("ℓ∞ PGD", 0.6), ("ℓ∞ FGSM", 0.4))
    },
    "biparo_table_2": {
        ("MAT-Rand", "RA ℓ2"): 0.6,
        ("PGD-AT", "RA ℓ2"): 0.4,
        ("MAT-Rand", "SA"): 0.4,
        ("PGD-AT", "SA"): 0.6,
    },
    "biparo_table_3": {
        (f"{network}, {words}", "RA ℓ2"): value
        for network in ("RN20", "WRN18", "VGG11")
        for words, value in (("MAT-Rand", 0.6), ("PGD-AT", 0.4))
    },
    "biparo_table_4": {("no noise", "RA"): 0.4, **{(f"σ {sigma}", "RA"): 0.6 for sigma in ("0.02", "0.05", "0.1")}},
    "biparo_table_5": {("NoiseNet", "RA"): 0.6, ("RN20", "RA"): 0.4},
    "biparo_table_6": {("95 / 5", "SA"): 0.6, ("PGD-AT", "SA"): 0.4},
    "biparo_fig_1": {("RA", "0.01"): 0.4, ("RA", "0.03"): 0.9, ("RA", "0.04"): 0.8, ("RA", "0.05"): 0.7},
    "biparo_fig_2": {("RA", "3"): 0.6, ("RA", "4"): 0.4},
    "poster_table_1": {("C&W 50 / 50", "RA, margin"): 0.6, ("PGD-AT", "RA, margin"): 0.4},
    "poster_table_2": {("RAT behind noise", "RA"): 0.6, ("AT", "RA"): 0.4, ("AT behind noise", "RA"): 0.4},
    "poster_table_3": {
        (row, column): value
        for at, column in (("PGD-AT ℓ∞", "RA ℓ2"), ("PGD-AT ℓ2", "RA ℓ∞"))
        for row, value in ((at, 0.4), ("MAT-Rand", 0.6), ("MAT-Max", 0.6))
    },
    "course_gairat": {
        (f"RN{depth}, {words}", "RA"): value
        for depth in (18, 34, 50)
        for words, value in (("GAIRAT", 0.6), ("PGD-AT", 0.4))
    },
    "course_pretrain": {("pretrained, 5 epochs at 0.001", "RA"): 0.6, ("drawn, 200 epochs", "RA"): 0.4},
    "course_normalisation": {
        (row, column): value for column in ("SA", "RA") for row, value in (("the data's own", 0.6), ("ImageNet's", 0.4))
    },
}

TRADES_3_THEN_5 = {(BEST, "SA"): 0.855, (BEST, "RA"): 0.5575}
ROB_TWICE = {("Rob, then Rob", "SA"): 0.8625, ("Rob, then Rob", "RA"): 0.522}
PUBLISHED: dict[str, dict[Cell, float]] = {
    "thesis_4_1": {("λ 0", "SA"): 0.829, ("λ 0", "RA"): 0.48, ("λ 5", "SA"): 0.816, ("λ 5", "RA"): 0.527},
    "thesis_4_2": {
        ("both, λ 0", "SA"): 0.829,
        ("both, λ 0", "RA"): 0.48,
        ("TRADES, λ 5", "SA"): 0.816,
        ("TRADES, λ 5", "RA"): 0.527,
        ("AdvReg, λ 5", "SA"): 0.765,
        ("AdvReg, λ 5", "RA"): 0.539,
    },
    "thesis_5_1": ROB_TWICE | TRADES_3_THEN_5,
    "thesis_5_2": TRADES_3_THEN_5,
    "thesis_5_3": TRADES_3_THEN_5,
    "thesis_5_4": TRADES_3_THEN_5
    | ROB_TWICE
    | {("no pretraining, TRADES 5", "SA"): 0.816, ("no pretraining, TRADES 5", "RA"): 0.527},
    "thesis_5_5": {(row, f"{column}, 180k"): value for (row, column), value in (ROB_TWICE | TRADES_3_THEN_5).items()},
    "biparo_table_2": {("PGD-AT", "RA ℓ2"): 0.415, ("MAT-Rand", "RA ℓ2"): 0.521},
    "course_gairat": {("RN50, GAIRAT", "SA"): 0.528, ("RN50, GAIRAT", "RA"): 0.42},
}
