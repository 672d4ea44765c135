"""Pictures as inline SVG, made on the server: each says its finding in its title and carries its data as a table."""

from dashboard.pictures.bits import BitsPoint, bits_picture
from dashboard.pictures.candidates import Candidate, Round, candidates_picture
from dashboard.pictures.coding import coding_picture
from dashboard.pictures.curve import Training, curve_picture, training_picture
from dashboard.pictures.generations import Generation, generations_picture
from dashboard.pictures.heatmap import Measure, heatmap_picture
from dashboard.pictures.heldout import heldout_picture
from dashboard.pictures.ledger import ledger_picture
from dashboard.pictures.lineage import Node, lineage_picture
from dashboard.pictures.matrices import Matrix
from dashboard.pictures.memory import memory_picture
from dashboard.pictures.pareto import Point, Quality, pareto_picture
from dashboard.pictures.ranks import Rank, ranks_picture
from dashboard.pictures.sharing import Sharing, sharing_picture
from dashboard.pictures.svg import Picture
from dashboard.pictures.timeline import Bar, Column, timeline_picture

__all__ = [
    "Bar",
    "BitsPoint",
    "Candidate",
    "Column",
    "Generation",
    "Matrix",
    "Measure",
    "Node",
    "Picture",
    "Point",
    "Quality",
    "Rank",
    "Round",
    "Sharing",
    "Training",
    "bits_picture",
    "candidates_picture",
    "coding_picture",
    "curve_picture",
    "generations_picture",
    "heatmap_picture",
    "heldout_picture",
    "ledger_picture",
    "lineage_picture",
    "memory_picture",
    "pareto_picture",
    "ranks_picture",
    "sharing_picture",
    "timeline_picture",
    "training_picture",
]
