"""Two sets of graphs that install without a download: handwritten digits as one graph, and molecules."""

from pathlib import Path
from typing import Literal, NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

DataName = Literal["digits", "molecules"]
Split = Literal["test", "train"]

# Of the 1,797 digits the first 1,000, and of the 4,991 molecules the first 3,500, in a random order that is always the
# same, are for training, the others for the test; the last of those for training are what settings are chosen on.
_DIGITS, _MOLECULES = 1000, 3500
_CHOICE = {"digits": 400, "molecules": 500}
_NEIGHBOURS = 8

_ELEMENTS = ("C", "N", "O", "S", "F", "Cl", "Br", "P", "I")
_MOST_NEIGHBOURS = 5


class GraphLoaders(NamedTuple):
    """Dataloaders of one set of graphs.

    Args:
        train: To train and to calibrate.
        validation: To evaluate.
        features: Number of features of a node.
        outputs: Number of classes, or 1 for a regression.
    """

    train: DataLoader
    validation: DataLoader
    features: int
    outputs: int


def graph_loaders(name: DataName, split: Split = "test", seed: int = 0) -> GraphLoaders:
    """Load a set of graphs.

    Args:
        name: ``"digits"``: one graph with a node for each of scikit-learn's 1,797 images and edges, both ways, between
            each and its 8 nearest neighbours. ``"molecules"``: 4,991 molecules of the National Cancer Institute, which
            RDKit brings, with their logP (Crippen) as target.
        split: Evaluate on the test part, or on a part of the training data that is then not trained on (to choose
            settings).
        seed: Random seed of the order of molecules.

    Raises:
        ValueError: If a name is unknown.
    """
    if name not in _CHOICE or split not in ("test", "train"):
        raise ValueError(f"data must be digits or molecules, and split test or train, got {name!r} and {split!r}.")
    kept = {"digits": _DIGITS, "molecules": _MOLECULES}[name] - (_CHOICE[name] if split == "train" else 0)
    if name == "digits":
        graph = digits_graph()
        order = torch.randperm(graph.num_nodes, generator=torch.Generator().manual_seed(0))
        graph.train_mask, graph.val_mask = (torch.zeros(graph.num_nodes, dtype=torch.bool) for _ in range(2))
        graph.train_mask[order[:kept]] = True
        graph.val_mask[order[kept:_DIGITS] if split == "train" else order[_DIGITS:]] = True
        loader = DataLoader([graph])
        return GraphLoaders(loader, loader, graph.num_features, 10)
    molecules = molecule_graphs()
    mixed = [molecules[i] for i in torch.randperm(len(molecules), generator=torch.Generator().manual_seed(0)).tolist()]
    chosen = mixed[kept:_MOLECULES] if split == "train" else mixed[_MOLECULES:]
    train = DataLoader(mixed[:kept], 64, shuffle=True, generator=torch.Generator().manual_seed(seed))
    return GraphLoaders(train, DataLoader(chosen, 500), molecules[0].num_features, 1)


def digits_graph() -> Data:
    """The digits as one graph, node features of shape (1797, 64) from 0 to 1."""
    images, digits = load_digits(return_X_y=True)
    near = kneighbors_graph(images, _NEIGHBOURS).tocoo()
    edges = torch.stack([torch.from_numpy(near.row), torch.from_numpy(near.col)]).long()
    edges = torch.cat([edges, edges.flip(0)], 1).unique(dim=1)
    return Data(torch.tensor(images, dtype=torch.float32) / 16, edges, y=torch.tensor(digits))


def molecule_graphs() -> list[Data]:
    """The molecules, each a graph of its atoms, with its logP as ``y``, shape (1,)."""
    from rdkit import Chem, RDConfig, rdBase
    from rdkit.Chem.rdMolDescriptors import CalcCrippenDescriptors

    rdBase.DisableLog("rdApp.*")
    lines = (Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi").read_text().splitlines()
    found = []
    for molecule in filter(None, (Chem.MolFromSmiles(line.split()[0]) for line in lines)):
        atoms = list(molecule.GetAtoms())
        features = torch.zeros(len(atoms), len(_ELEMENTS) + 1 + _MOST_NEIGHBOURS + 1 + 5 + 2)
        for row, atom in zip(features, atoms, strict=True):
            symbol = atom.GetSymbol()
            place = _ELEMENTS.index(symbol) if symbol in _ELEMENTS else len(_ELEMENTS)
            row[place] = 1
            row[len(_ELEMENTS) + 1 + min(atom.GetDegree(), _MOST_NEIGHBOURS)] = 1
            row[len(_ELEMENTS) + _MOST_NEIGHBOURS + 2 + min(atom.GetTotalNumHs(), 4)] = 1
            row[-2], row[-1] = float(atom.GetIsAromatic()), float(atom.IsInRing())
        bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]
        if not bonds:
            continue
        edges = torch.tensor(bonds).t()
        edges = torch.cat([edges, edges.flip(0)], 1)
        found.append(Data(features, edges, y=torch.tensor([CalcCrippenDescriptors(molecule)[0]])))
    return found
