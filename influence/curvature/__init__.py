"""The Hessian and the Gauss-Newton matrix of a risk, as operators."""
