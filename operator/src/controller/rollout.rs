//! How replicas move from old revisions to the newest: counts of at most two Deployments. Pure.

use ashlar_crds::Surge;

/// What is known of one revision's pods.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RevisionState {
    /// Its hash.
    pub hash: String,
    /// Order of creation.
    pub number: i64,
    /// Replicas that its Deployment asks for now.
    pub replicas: i32,
    /// Pod objects, terminating ones included.
    pub pods: i32,
    /// Pods that are ready and not terminating.
    pub ready: i32,
    /// Pods that are on a node.
    pub scheduled: i32,
    /// All its replicas were ready once.
    pub proven: bool,
    /// A pod has waited ten seconds for a node.
    pub unschedulable: bool,
    /// Its pods do not start: the words of the failure.
    pub failed: Option<String>,
    /// Its trial is over, and it takes over.
    pub promoted: bool,
    /// Its trial is over, and the revision before stays: why.
    pub rolled_back: Option<String>,
}

/// What to ask of the Deployments.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RolloutPlan {
    /// Replicas of the newest revision.
    pub newest: i32,
    /// Hash and replicas of the revision that it replaces, while that has any.
    pub previous: Option<(String, i32)>,
    /// `Surge` or `InPlace`, with the reason, while a rollout is under way.
    pub rollout: Option<String>,
    /// The newest revision has failed while an older one exists: the old one serves.
    pub halted: bool,
    /// Share of the requests that the newest revision gets, in percent, while it is on trial or was rolled back.
    pub weight: Option<i32>,
}

/// What a step depends on besides the revisions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Circumstances {
    /// Replicas wanted in all.
    pub wanted: i32,
    /// Whether a new pod may start before an old one ends.
    pub surge: Surge,
    /// How many pods more nodes have room for; none when that is not known.
    pub room: Option<i32>,
    /// This rollout has been going on in place.
    pub in_place: bool,
    /// The newest revision is on trial with so many percent of the requests.
    pub canary: Option<i32>,
}

/// Decides the next step.
///
/// Surge: one new pod more, and when it is ready one old pod less. In place: one old pod less, and when it is gone one
/// new pod more: never a pending pod. An old revision never gets more replicas, so that the two ways cannot take turns,
/// with two exceptions: a new revision that fails to start stops the rollout, and the one before serves again; and during a
/// trial the one before keeps its share of what is wanted, from zero too.
#[must_use]
pub fn plan(
    circumstances: &Circumstances,
    newest: &RevisionState,
    older: &[RevisionState],
) -> RolloutPlan {
    let plan = steps(circumstances, newest, older);
    match (circumstances.canary, &plan.previous) {
        (Some(weight), Some(_)) if !plan.halted => {
            on_trial(plan, circumstances, newest, older, weight)
        }
        _ => plan,
    }
}

/// A rollout goes on until the newest revision has its share of the replicas, and at least one old pod stays.
fn on_trial(
    mut plan: RolloutPlan,
    circumstances: &Circumstances,
    newest: &RevisionState,
    older: &[RevisionState],
    weight: i32,
) -> RolloutPlan {
    let wanted = circumstances.wanted;
    let share = (wanted.saturating_mul(weight) + 99) / 100;
    let share = share.clamp(1, (wanted - 1).max(1));
    plan.newest = plan.newest.min(share);
    let mut waking = false;
    if let Some((hash, old)) = &mut plan.previous {
        *old = (*old).max(wanted - share).max(wanted.min(1));
        let is = |other: &&RevisionState| other.hash == *hash;
        waking = older.iter().find(is).is_some_and(|r| r.replicas == 0);
    }
    if waking {
        // The place that is left, if it is one only, belongs to the revision that has proved itself.
        plan.newest = plan.newest.min(newest.replicas);
    }
    plan.weight = Some(weight);
    let hash = &newest.hash;
    let state = if wanted == 0 {
        "it goes on when requests come".to_owned()
    } else if newest.ready >= share {
        format!("revision {hash} gets {weight} % of the requests")
    } else if waking {
        "the revision before starts first".to_owned()
    } else if plan.newest == 0 {
        "no node has room for one pod more beside the last one".to_owned()
    } else {
        format!(
            "{} of {share} pods of revision {hash} are ready",
            newest.ready
        )
    };
    plan.rollout = Some(format!(
        "Canary: {state}; to decide by hand set annotation serving.ashlar.dev/canary to promote@{hash} or rollback@{hash}"
    ));
    plan
}

fn steps(
    circumstances: &Circumstances,
    newest: &RevisionState,
    older: &[RevisionState],
) -> RolloutPlan {
    let wanted = circumstances.wanted;
    let Some(previous) = serves_beside(circumstances, newest, older) else {
        return RolloutPlan {
            newest: wanted,
            ..RolloutPlan::default()
        };
    };
    let step = |newest, old, rollout| RolloutPlan {
        newest,
        previous: Some((previous.hash.clone(), old)),
        rollout,
        ..RolloutPlan::default()
    };
    // Pods of every old revision hold their places until they are gone.
    let old_pods: i32 = older.iter().map(|r| r.pods).sum();
    let in_place = why_in_place(circumstances, newest, old_pods);
    if wanted == 0 {
        return step(0, 0, None);
    }
    if let Some(why) = &newest.rolled_back {
        return RolloutPlan {
            halted: true,
            weight: Some(0),
            ..step(0, wanted, Some(format!("Halted: {why}")))
        };
    }
    if let Some(failure) = &newest.failed {
        let back = wanted - newest.ready.min(wanted);
        let needs_place = in_place.is_some()
            || older.iter().any(|r| r.unschedulable)
            || finds_no_place(previous, back, circumstances.room);
        return RolloutPlan {
            halted: true,
            ..step(
                kept_of_failed(newest, needs_place),
                back,
                Some(format!("Halted: {failure}")),
            )
        };
    }
    let ready = newest.ready.min(wanted);
    if ready == wanted && old_pods == 0 {
        return step(wanted, 0, None);
    }
    if let Some(reason) = in_place {
        return step(
            // A place is free when its pod object is gone, not when it has been asked to go.
            (wanted - old_pods).max(ready).min(wanted),
            previous.replicas.min((wanted - ready - 1).max(0)),
            Some(format!("InPlace: {reason}")),
        );
    }
    let room = circumstances
        .room
        .filter(|_| circumstances.surge == Surge::Auto);
    let up =
        (wanted + 1 - old_pods).min(room.map_or(wanted, |room| newest.pods.saturating_add(room)));
    step(
        up.max(newest.replicas).clamp(0, wanted),
        previous.replicas.min(wanted - ready),
        Some("Surge: a new pod starts before an old one ends".to_owned()),
    )
}

/// The older revision that serves while the newest one comes, or again when it has failed.
fn serves_beside<'a>(
    circumstances: &Circumstances,
    newest: &RevisionState,
    older: &'a [RevisionState],
) -> Option<&'a RevisionState> {
    let back = newest.failed.is_some() || newest.rolled_back.is_some();
    let canary = circumstances.canary.is_some();
    let candidates = older
        .iter()
        .filter(|r| r.replicas > 0 || r.pods > 0 || back || (canary && r.proven));
    candidates.max_by_key(|r| {
        // Of those that serve, the last one: it has most pods by now.
        let proven = r.proven && (r.replicas == 0 || canary);
        (r.ready > 0, r.replicas > 0, proven, r.number)
    })
}

/// The step while the newest revision's model is still on its way: it gets no replica more, and who serves goes on.
#[must_use]
pub fn wait(wanted: i32, newest: &RevisionState, older: &[RevisionState]) -> RolloutPlan {
    let kept = newest.replicas.min(wanted);
    let serving = older
        .iter()
        .filter(|r| r.replicas > 0 || r.pods > 0)
        .max_by_key(|r| (r.ready > 0, r.replicas > 0, r.number));
    RolloutPlan {
        newest: kept,
        previous: serving.map(|r| (r.hash.clone(), wanted - kept)),
        rollout: serving
            .map(|_| "Waiting: the model of the new revision is being downloaded".to_owned()),
        ..RolloutPlan::default()
    }
}

/// Why the rollout goes on in place; none when it surges.
fn why_in_place(
    circumstances: &Circumstances,
    newest: &RevisionState,
    old_pods: i32,
) -> Option<&'static str> {
    // The surge pod that exists has taken the room that was found for it.
    let surging = newest.pods > 0 && newest.pods + old_pods > circumstances.wanted;
    match circumstances.surge {
        Surge::Never => Some("surge is Never"),
        Surge::Auto if newest.unschedulable => Some("the scheduler finds no node for one pod more"),
        Surge::Auto if circumstances.in_place => Some("no node had room for one pod more"),
        Surge::Auto if !surging && circumstances.room.is_some_and(|room| room <= 0) => {
            Some("no node has room for one pod more")
        }
        Surge::Auto | Surge::Always => None,
    }
}

/// Whether the revision that serves again has fewer pods on nodes than it needs, and no other places are known for them. In
/// place this is always so, and it is seen without a memory of how the rollout went; after a surge all its pods are there.
fn finds_no_place(previous: &RevisionState, back: i32, room: Option<i32>) -> bool {
    back - previous.scheduled > room.unwrap_or(0).max(0)
}

/// Keeps one failing pod to look at while the old revision does not need its place.
fn kept_of_failed(newest: &RevisionState, needs_place: bool) -> i32 {
    if needs_place {
        newest.ready
    } else {
        newest.ready.max(1).min(newest.replicas)
    }
}

#[cfg(test)]
mod played;
#[cfg(test)]
mod tests;
