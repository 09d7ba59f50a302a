"""Judging by people: a study of pictures, who is shown what, the answers, and what they say."""
