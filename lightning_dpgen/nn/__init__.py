"""Networks: the six classifiers of the evaluation."""
