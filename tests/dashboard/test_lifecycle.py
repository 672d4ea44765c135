"""The state machines as pure functions: every pair of states is either a known way or a refusal."""

from __future__ import annotations

import pytest

from dashboard.lifecycle import (
    DEPLOYMENT_TRANSITIONS,
    JOB_TRANSITIONS,
    TERMINAL_JOB_STATES,
    DeploymentState,
    JobState,
    Refused,
    deployment_next,
    job_next,
)


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("target", JobState)
def test_a_job_goes_only_known_ways(state: JobState, target: JobState) -> None:
    if target in JOB_TRANSITIONS.get(state, ()):
        assert job_next(state, target) == target
    else:
        with pytest.raises(Refused, match=f"{state.value} cannot become {target.value}"):
            job_next(state, target)


@pytest.mark.parametrize("state", sorted(TERMINAL_JOB_STATES))
def test_nothing_leads_out_of_an_end(state: JobState) -> None:
    assert not JOB_TRANSITIONS.get(state)


def test_every_accepted_job_can_reach_an_end() -> None:
    reaching = set(TERMINAL_JOB_STATES)
    for _ in JobState:
        reaching |= {state for state, targets in JOB_TRANSITIONS.items() if targets & reaching}
    assert reaching == set(JobState)


def test_only_what_was_verified_succeeds() -> None:
    assert [state for state, targets in JOB_TRANSITIONS.items() if JobState.SUCCEEDED in targets] == [
        JobState.VERIFYING
    ]


@pytest.mark.parametrize("state", DeploymentState)
@pytest.mark.parametrize("target", DeploymentState)
def test_a_deployment_goes_only_known_ways(state: DeploymentState, target: DeploymentState) -> None:
    if target in DEPLOYMENT_TRANSITIONS.get(state, ()):
        assert deployment_next(state, target) == target
    else:
        with pytest.raises(Refused):
            deployment_next(state, target)


@pytest.mark.parametrize(
    "state", [DeploymentState.REQUESTED, DeploymentState.LOADING, DeploymentState.LIVE, DeploymentState.REFUSED]
)
def test_a_rollback_is_possible_from_every_state_of_what_is_active(state: DeploymentState) -> None:
    assert deployment_next(state, DeploymentState.ROLLED_BACK) == DeploymentState.ROLLED_BACK
