"""Builds shards from posts: scan, plan, write, manifest. A build that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

from crossguard.configs.errors import JobError, UserError
from crossguard.configs.progress import progress
from crossguard.configs.schema import Config
from crossguard.data.curation.splits import Splitter
from crossguard.data.records import canonical_json
from crossguard.data.shards import manifest as manifests
from crossguard.data.shards import plan as plans
from crossguard.data.shards import spool as spools
from crossguard.data.shards.append import posts_held
from crossguard.data.shards.executor import Executor, open_executor
from crossguard.data.shards.files import write_atomic
from crossguard.data.shards.manifest import Manifest
from crossguard.data.shards.plan import Plan, make_plan
from crossguard.data.shards.scan import scan
from crossguard.data.shards.workspace import Workspace
from crossguard.data.shards.writer import BUILD_FOLDER, DoneShard, ShardTask, read_done, write_shard
from crossguard.data.sources import Source, fingerprint_of, open_source
from crossguard.data.taxonomy import Taxonomy

logger = logging.getLogger(__name__)

_BUILD_STAGE = b'"stage":"build"'  # as canonical JSON writes it


def build_shards(
    config: Config, shards_dir: Path, quarantine_path: Path, *, now: float | None = None, source: Source | None = None
) -> Manifest:
    """Build the shards of a recipe, or return those that are already there.

    The same posts and settings give the same bytes, for any number of processes and any order of the files. The
    manifest appears last: a folder with a manifest is complete. Without `data.path`, shards that were built before are
    taken as they are. With `build.append`, posts that the shards lack go into new ones, under a manifest that names
    the one before as its parent.

    Args:
        config: the recipe.
        shards_dir: where shards are written.
        quarantine_path: a JSON lines file that names the posts whose media is missing or corrupt.
        now: seconds since 1970 that `expires_at` is compared with; by default the clock's.
        source: where the posts come from; by default what the configuration names.

    Raises:
        UserError: posts are wrong (all of them listed), too much media is missing or corrupt, or the folder holds
            something else, or posts that `build.append` finds in the shards have changed. Nothing half-built is left
            behind.
        JobError: another build is at work in the folder, a process died, or the disk failed. What is done is kept.
    """
    taxonomy = Taxonomy.from_config(config.taxonomy)
    if elsewhere := _built_elsewhere(config, shards_dir, taxonomy):
        return elsewhere
    executor = open_executor(config.build)
    source = source or open_source(config.data, taxonomy, config.seed)
    inputs = _inputs_hash(config, taxonomy, source)
    existing = _existing(shards_dir, inputs, taxonomy, config.build.append)
    if existing and existing.inputs == inputs and not Workspace(shards_dir).path.exists():
        return existing
    try:
        with Workspace(shards_dir) as workspace:
            parent = _existing(shards_dir, inputs, taxonomy, config.build.append)
            if parent and parent.inputs == inputs:
                return parent
            plan = _unfinished(workspace, inputs, parent)
            if plan is None:
                moment = time.time() if now is None else now
                plan = _scan(config, workspace, source, taxonomy, inputs, parent, executor, moment)
            done = _write(plan, shards_dir, executor)
            _quarantine(quarantine_path, done)
            _check_refused(done, plan, parent, config, quarantine_path)
            workspace.remove_empty_splits(plan)
            return _swap_in(plan, taxonomy, done, parent, workspace)
    except OSError as error:
        raise JobError(f"build: {error.strerror}: {error.filename or shards_dir}; start again, it goes on") from error


def _built_elsewhere(config: Config, shards_dir: Path, taxonomy: Taxonomy) -> Manifest | None:
    """Shards that are there already, where nothing says where their posts are."""
    if config.data.has_posts or not (shards_dir / manifests.FILE_NAME).exists():
        return None
    finished = Manifest.load(shards_dir)
    finished.check_taxonomy(taxonomy)
    return finished


def _inputs_hash(config: Config, taxonomy: Taxonomy, source: Source) -> str:
    """A hash of all that decides the bytes; raises as `fingerprint_of` does."""
    decides = {
        "format": manifests.FORMAT,
        "posts": fingerprint_of(source, config.data),
        "taxonomy": taxonomy.to_json(),
        "limit": config.data.limit,
        "samples_per_shard": config.build.samples_per_shard,
        "splits": dict(config.build.splits),
    }
    return hashlib.sha256(canonical_json(decides)).hexdigest()


def _existing(shards_dir: Path, inputs: str, taxonomy: Taxonomy, append: bool) -> Manifest | None:
    """The finished shards in the folder: those of these inputs or, to append to, of any.

    Raises:
        UserError: the folder holds shards of another taxonomy, or of other inputs, and nothing says that they are to
            be appended to.
    """
    if not (shards_dir / manifests.FILE_NAME).exists():
        return None
    found = Manifest.load(shards_dir)
    if found.inputs != inputs:
        found.check_taxonomy(taxonomy)
    if found.inputs != inputs and not append:
        raise UserError(
            f"{shards_dir}: holds shards of other posts or settings, which are never overwritten; add new posts with "
            "build.append=true, remove the folder, or choose another one with data.shards=DIR"
        )
    return found


def _unfinished(workspace: Workspace, inputs: str, parent: Manifest | None) -> Plan | None:
    """The plan of a build of these inputs that was killed; what another one left is removed."""
    plan = Plan.load(workspace.path)
    same = plan and plan.inputs == inputs and plan.parent == (parent.sha256 if parent else "")
    if plan and same and all(Path(root).is_dir() for root in plan.roots):
        return plan
    if plan:
        logger.warning("%s: an unfinished build of other posts or settings is removed", workspace.shards_dir)
    workspace.discard()
    return None


def _scan(
    config: Config,
    workspace: Workspace,
    source: Source,
    taxonomy: Taxonomy,
    inputs: str,
    parent: Manifest | None,
    executor: Executor,
    now: float,
) -> Plan:
    """Read, check and spool all posts, and plan the shards of those that the parent does not hold."""
    spool = spools.SpoolWriter(workspace.path / spools.FILE_NAME, taxonomy.names)
    try:
        scan(source, taxonomy, Splitter(config.build.splits), spool, now, config.build.max_errors_listed)
        held = posts_held(workspace.shards_dir, parent, spool, executor) if parent else None
    finally:
        spool.close()
    limit, samples_per_shard = config.data.limit, config.build.samples_per_shard
    plan, rows = make_plan(spool, taxonomy.names, inputs, limit, samples_per_shard, parent, held)
    if not plan.posts and not parent:
        kept_out = ", ".join(f"{count} by {rule}" for rule, count in plan.left_out.items() if count)
        raise UserError(f"data.path: no post may be used ({kept_out} left out); nothing was built")
    plan.save(workspace.path, rows)
    return plan


def _write(plan: Plan, shards_dir: Path, executor: Executor) -> list[DoneShard]:
    """Write the shards that are not done yet, and return what became of all, in the order of the plan."""
    folder = shards_dir.absolute()
    done = {shard: found for shard in plan.shards if (found := read_done(folder, shard))}
    tasks = [ShardTask(folder, shard, plan.roots, plan.strata) for shard in plan.shards if shard not in done]
    needed = (folder / BUILD_FOLDER / plans.FILE_NAME, *map(Path, plan.roots))
    with progress("build", plan.posts, "posts", done=sum(shard.stop - shard.start for shard in done)) as shown:
        for task, result in executor.run(write_shard, tasks, needed):
            done[task.shard] = result
            shown.advance(task.shard.stop - task.shard.start)
    return [done[shard] for shard in plan.shards]


def _quarantine(path: Path, done: list[DoneShard]) -> None:
    """Replace the lines of earlier builds in the quarantine file; those of other stages stay."""
    refused = sorted((post for shard in done for post in shard.refused), key=lambda post: post["id"])
    ours = [canonical_json({**post, "stage": "build"}) for post in refused]
    lines = path.read_bytes().splitlines() if path.exists() else []
    others = [line for line in lines if _BUILD_STAGE not in line]  # as text: a kill may have torn a line
    if ours or len(others) != len(lines):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, b"".join(line + b"\n" for line in [*ours, *others]))


def _check_refused(
    done: list[DoneShard], plan: Plan, parent: Manifest | None, config: Config, quarantine_path: Path
) -> None:
    refused = [post for shard in done for post in shard.refused]
    posts = plan.posts + (sum(parent.splits.values()) if parent else 0)
    if len(refused) > config.build.max_refused * posts:
        first = refused[0]
        start = f"data.media_dir={config.data.media_dir}" if config.data.media_dir else "the folder of the posts' file"
        raise UserError(
            f"{first['place']}: {first['reason']}; {len(refused)} of {posts} posts are refused for such media, "
            f"more than build.max_refused={config.build.max_refused}; paths start from {start}; all are named in "
            f"{quarantine_path}"
        )


def _swap_in(
    plan: Plan, taxonomy: Taxonomy, done: list[DoneShard], parent: Manifest | None, workspace: Workspace
) -> Manifest:
    """Put the manifest in place; that of the parent is kept among the earlier ones."""
    added = tuple(shard.info for shard in done if shard.info)
    if parent and not added:
        return parent
    if parent:
        parent.keep(workspace.shards_dir, workspace.path)
    manifest = Manifest(
        taxonomy=taxonomy,
        rarity=plan.rarity,
        strata=plan.strata,
        shards=(*(parent.shards if parent else ()), *added),
        left_out=plan.left_out,
        refused=sum(len(shard.refused) for shard in done),
        inputs=plan.inputs,
        parent=plan.parent,
        version=parent.version + 1 if parent else 1,
    )
    return manifest.save(workspace.shards_dir, workspace.path)
