"""Write or upload a W&B Report, with a section per study, for those who have the runs on W&B.

::

    tunefleet wandb-report studies/NAME              # writes studies/NAME/wandb_report.json
    tunefleet wandb-report studies/* --project mine --entity team --save

Without --save nothing is sent: the file holds the report as W&B takes it. Its panels show runs whose
group is the study's folder name and whose job_type is trial, final or study, as search/ logs them.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # from a clone: its own folder would make stats, data, … importable
    sys.path[0] = str(Path(__file__).resolve().parents[1] / "src")
    from tunefleet.__main__ import script

    script("wandb-report")

import argparse
import os
from typing import TYPE_CHECKING, Any

from tunefleet.analysis.facts import cards, plain, title
from tunefleet.analysis.load import StudyResults, load
from tunefleet.analysis.text import reason
from tunefleet.cli import INSTALL, Parser, exit_code, path_argument, printable, writing

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr

PROJECT = "tunefleet"  # W&B's, where neither --project nor WANDB_PROJECT names one
MEDIA = (  # keys of the run of job_type "study": its figures
    *("figures/winner_curves", "figures/all_curves", "figures/best_so_far", "figures/hyperparameters"),
    "figures/importance",
)
IMAGE_MEDIA = (  # the same, of trainings on images only
    *("figures/confusion", "figures/confused_pairs", "figures/class_accuracy"),
    *("figures/lr_curves", "misclassified"),
)
TITLE_MOST = 128  # characters that W&B allows
RETRIES = {  # wandb asks a server that does not answer for minutes otherwise (0.31)
    "WANDB_X_GRAPHQL_RETRY_MAX": "3",
    "WANDB_X_GRAPHQL_RETRY_WAIT_MAX_SECONDS": "2",
    "WANDB_HTTP_TIMEOUT": "20",
}


def build(
    studies: list[StudyResults], *, entity: str, project: str, groups: list[str], linked: bool
) -> wr.Report:
    """Return the report, a section per study.

    Args:
        studies: Finished or not.
        entity: W&B's team or user; "" without one.
        project: W&B's, where the runs are.
        groups: Of each study's runs.
        linked: Name entity and project in each set of runs, too, which asks the server for their ids;
            without, a set is of the report's own project.

    Raises:
        ValueError: wandb-workspaces is not installed.
    """
    wr = _library()
    blocks: list[Any] = [wr.TableOfContents()] if len(studies) > 1 else []
    place = {"entity": entity, "project": project} if linked else {}
    for study, group in zip(studies, groups, strict=True):
        blocks += _section(wr, study, group, place)
    names = ", ".join(map(title, studies))
    return wr.Report(
        entity=entity,
        project=project,
        title=names if len(names) <= TITLE_MOST else f"{len(studies)} studies",
        description="Studies of tunefleet: what was searched, what was found, what it cost.",
        blocks=blocks,
        width="fluid",
    )


def _library() -> Any:
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise ValueError(f"a W&B Report needs the package wandb-workspaces ({error}); {INSTALL}") from None
    return wr


def _section(wr: Any, study: StudyResults, group: str, place: dict[str, str]) -> list[Any]:
    def runs(job_type: str, name: str) -> Any:
        # as text with repr(): a list of expressions forgets to quote a quote (wandb-workspaces 0.4)
        chosen = f"Metric('Group') == {group!r} and Metric('JobType') == {job_type!r}"
        return wr.Runset(name=name, filters=chosen, **place)

    blocks = [wr.H2(title(study)), *headline(wr, study)]
    blocks.append(wr.PanelGrid(runsets=[runs("trial", "trials")], panels=_of_trials(wr, study)))
    training, tested = "train_loss", "test_accuracy"
    if not study.trains_images:
        training, tested = study.metric.name, study.metric.test_name
    if not study.finals.empty:
        blocks += [
            wr.H3("The winner's fresh seeds"),
            wr.PanelGrid(
                runsets=[runs("final", "fresh seeds")],
                panels=[
                    wr.LinePlot(title=training, x="epoch", y=[training], layout=_place(wr, 0, 0)),
                    wr.BarPlot(title=tested, metrics=[tested], layout=_place(wr, 12, 0)),
                ],
            ),
        ]
    keys = [*MEDIA, *(IMAGE_MEDIA if study.trains_images else ())]
    media = wr.MediaBrowser(media_keys=keys, num_columns=2, layout=_place(wr, 0, 0, 24, 16))
    return [*blocks, wr.H3("Figures"), wr.PanelGrid(runsets=[runs("study", "the study")], panels=[media])]


def headline(wr: Any, study: StudyResults) -> list[Any]:
    """Return the study's numbers as paragraphs, those of the HTML report."""
    best = study.facts.get("best")
    blocks = [wr.UnorderedList(items=[f"{value}: {name}" for name, value in cards(study)])]
    if best:
        config = best["config"]
        values = ", ".join(
            f"{name} {plain(config[name])}" for name in study.hyperparameters if name in config
        )
        blocks.append(wr.P(f"Best configuration, trial {best['trial_id']}: {values}."))
    return blocks


def _of_trials(wr: Any, study: StudyResults) -> list[Any]:
    ranges, metric = study.facts.get("ranges", {}), study.metric.name
    best, losses = f"best_{metric}", ["train_loss", "val_loss"]
    if not study.trains_images:
        losses = [f"train_{metric.removeprefix('val_')}", metric]
    columns = [
        wr.ParallelCoordinatesPlotColumn(wr.Config(name), log=bool(ranges.get(name, {}).get("log")))
        for name in study.hyperparameters
    ]
    columns.append(wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(best)))
    across = "lr" if "lr" in study.hyperparameters or study.trains_images else study.hyperparameters[0]
    return [
        wr.LinePlot(title=metric, x="epoch", y=[metric], layout=_place(wr, 0, 0)),
        wr.LinePlot(title=", ".join(losses), x="epoch", y=losses, layout=_place(wr, 12, 0)),
        wr.ParallelCoordinatesPlot(
            title="each line is a trial", columns=columns, layout=_place(wr, 0, 8, 24, 10)
        ),
        wr.ParameterImportancePlot(with_respect_to=best, layout=_place(wr, 0, 18)),
        wr.ScatterPlot(
            title=f"{across} against {'accuracy' if metric == 'val_accuracy' else metric}",
            x=wr.Config(across),
            y=wr.SummaryMetric(best),
            log_x=bool(ranges.get(across, {"log": True}).get("log")),
            layout=_place(wr, 12, 18),
        ),
        wr.RunComparer(diff_only="split", layout=_place(wr, 0, 26, 24, 10)),
    ]


def _place(wr: Any, x: int, y: int, w: int = 12, h: int = 8) -> Any:
    return wr.Layout(x=x, y=y, w=w, h=h)  # of a grid 24 wide


def save(studies: list[StudyResults], *, entity: str, project: str, groups: list[str]) -> str:
    """Upload the report; return its address.

    Raises:
        ValueError: No key, no such project, or a server that does not answer.
    """
    _library()
    import wandb

    for name, value in RETRIES.items():
        os.environ.setdefault(name, value)
    try:
        entity = entity or wandb.Api().default_entity or ""
        report = build(studies, entity=entity, project=project, groups=groups, linked=bool(entity))
        return str(report.save().url)
    except (wandb.errors.Error, OSError, ValueError) as error:  # of a base URL, pydantic's
        raise ValueError(
            f"--save: W&B cannot be used ({reason(error)}); log in by `wandb login` or WANDB_API_KEY, "
            "or leave --save out"
        ) from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(prog="tunefleet wandb-report", description=__doc__.split("\n")[0])
    parser.add_argument("study", nargs="+", help="a study's folder or URL; each becomes a section")
    parser.add_argument("--project", help=f"W&B's (default: WANDB_PROJECT, else {PROJECT})")
    parser.add_argument("--entity", help="W&B's team or user (default: WANDB_ENTITY, else the key's own)")
    parser.add_argument("--group", nargs="+", help="of the runs, one per study (default: the folders' names)")
    parser.add_argument(
        "--out", type=path_argument, help="where to write wandb_report.json (default: as report)"
    )
    parser.add_argument("--save", action="store_true", help="upload the report instead of writing the file")
    options = parser.parse_args(arguments)
    return exit_code(lambda: _report(options))


def _report(options: argparse.Namespace) -> int:
    """Upload or write the report; return the exit code.

    Raises:
        ValueError: It cannot be done.
    """
    entity = options.entity or os.environ.get("WANDB_ENTITY", "")
    project = options.project or os.environ.get("WANDB_PROJECT") or PROJECT
    studies = [load(study) for study in options.study]
    groups = printable(options.group or [study.name for study in studies])
    if len(groups) != len(studies):
        raise ValueError(f"--group names {len(groups)} groups for {len(studies)} studies; give one each")
    if options.save:
        print(save(studies, entity=entity, project=project, groups=groups))
        return 0
    report = build(studies, entity=entity, project=project, groups=groups, linked=False)
    out = options.out or (studies[0].folder if len(studies) == 1 else Path("report"))
    file = out / "wandb_report.json"
    content = report._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    print(printable(str(file)))
    return 0
