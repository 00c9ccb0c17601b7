"""The paper's models. Each one defines a network, a loss and a fit."""

from influence.models.cnn import AllCNN
from influence.models.hinge import SmoothHinge, SmoothHingeLoss
from influence.models.logistic import BinaryLogisticRegression, MulticlassLogisticRegression
from influence.models.top_layer import TopLayer, scaled

__all__ = ["AllCNN", "BinaryLogisticRegression", "MulticlassLogisticRegression", "SmoothHinge"]
__all__ += ["SmoothHingeLoss", "TopLayer", "scaled"]
