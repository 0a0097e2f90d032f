"""A reward that a model of random letters can learn: more of them."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    return sum(char.isalpha() for char in solution_str) / 32
