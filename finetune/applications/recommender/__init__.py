"""The recommender: from what a person had to a ranked list, with reasons.

from finetune.applications.recommender import load_recommender

recommender = load_recommender("runs/recommendation")
for item in recommender.recommend(["B0001", "B0007"], top=5).items:
    print(item.id, item.why)
"""

from finetune.applications.recommender.load import load_recommender
from finetune.applications.recommender.recommender import Recommender
from finetune.applications.recommender.records import RankedList, Recommended

__all__ = ["RankedList", "Recommended", "Recommender", "load_recommender"]
