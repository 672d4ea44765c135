"""Every address of Deltaworks. Each view names its rule; a test walks this table and fails on one that does not."""

from __future__ import annotations

from django.urls import path

from dashboard.views import (
    accounts,
    approvals,
    escrows,
    evaluations,
    history,
    jobs,
    overview,
    registry,
    releases,
    storage,
    system,
)

urlpatterns = [
    path("", overview.overview, name="overview"),
    path("search/", overview.search, name="search"),
    path("registry/", registry.checkpoint_list, name="checkpoint-list"),
    path("registry/import/", registry.checkpoint_import_page, name="checkpoint-import"),
    path("registry/checkpoints/<slug:name>/", registry.checkpoint_detail, name="checkpoint-detail"),
    path("registry/checkpoints/<slug:name>/differences/", registry.differences, name="checkpoint-differences"),
    path("registry/checkpoints/<slug:name>/rehearse/", approvals.rehearsal_create_page, name="rehearsal-create"),
    path("registry/checkpoints/<slug:name>/escrow/", escrows.escrow_create_page, name="escrow-create"),
    path("registry/checkpoints/<slug:name>/release/", escrows.escrow_release_page, name="escrow-release"),
    path("registry/checkpoints/<slug:name>/restore/", escrows.escrow_restore_page, name="escrow-restore"),
    path("registry/artifacts/<int:pk>/", registry.artifact_detail, name="artifact-detail"),
    path("registry/artifacts/<int:pk>/retire/", registry.artifact_retire_page, name="artifact-retire"),
    path("registry/artifacts/<int:pk>/approval/", approvals.approval_new, name="approval-new"),
    path("jobs/", jobs.job_list, name="job-list"),
    path("jobs/new/", jobs.job_new, name="job-new"),
    path("jobs/new/<slug:method>/", jobs.job_create, name="job-create"),
    path("jobs/<int:pk>/", jobs.job_detail, name="job-detail"),
    path("jobs/<int:pk>/log/", jobs.job_log, name="job-log"),
    path("jobs/<int:pk>/log.txt", jobs.job_log_download, name="job-log-download"),
    path("jobs/<int:pk>/cancel/", jobs.job_cancel_page, name="job-cancel"),
    path("jobs/<int:pk>/retry/", jobs.job_retry_page, name="job-retry"),
    path("jobs/<int:pk>/priority/", jobs.job_priority, name="job-priority"),
    path("evaluations/", evaluations.evaluation_list, name="evaluation-list"),
    path("evaluations/new/", evaluations.evaluation_new, name="evaluation-new"),
    path("evaluations/<int:pk>/", evaluations.evaluation_detail, name="evaluation-detail"),
    path("evaluations/sets/", evaluations.sample_set_list, name="set-list"),
    path("evaluations/sets/upload/", evaluations.sample_set_upload, name="set-upload"),
    path("evaluations/sets/<slug:name>/<int:version>/", evaluations.sample_set_detail, name="set-detail"),
    path("approvals/", approvals.approval_list, name="approval-list"),
    path("approvals/<int:pk>/", approvals.approval_detail, name="approval-detail"),
    path("approvals/<int:pk>/decide/", approvals.approval_decide_page, name="approval-decide"),
    path("approvals/<int:pk>/revoke/", approvals.approval_revoke_page, name="approval-revoke"),
    path("policy/", approvals.policy, name="policy"),
    path("policy/change/", approvals.policy_change, name="policy-change"),
    path("releases/", releases.environment_list, name="environment-list"),
    path("releases/<slug:name>/", releases.environment_detail, name="environment-detail"),
    path("releases/<slug:name>/deploy/", releases.deploy, name="deployment-create"),
    path("releases/<slug:name>/full-precision/", releases.deploy_full_precision, name="deployment-full-precision"),
    path("releases/<slug:name>/rollback/", releases.rollback_page, name="rollback"),
    path("history/", history.history_page, name="history"),
    path("workers/", system.workers, name="worker-list"),
    path("storage/", storage.storage_page, name="storage"),
    path("storage/look/", storage.look, name="storage-look"),
    path("storage/sweeps/<int:pk>/free/", storage.free, name="sweep-free"),
    path("storage/sweeps/<int:pk>/blobs.txt", storage.sweep_list, name="sweep-list"),
    path("glossary/", system.glossary, name="glossary"),
    path("users/", accounts.user_list, name="user-list"),
    path("users/<int:pk>/role/", accounts.user_role, name="user-role"),
    path("settings/", accounts.preferences, name="preferences"),
    path("sign-in/", accounts.sign_in, name="sign-in"),
    path("sign-out/", accounts.sign_out, name="sign-out"),
    path("language/", accounts.language, name="language"),
    path("livez", system.livez, name="livez"),
    path("readyz", system.readyz, name="readyz"),
]

handler400 = "dashboard.views.errors.bad_request"
handler403 = "dashboard.views.errors.forbidden"
handler404 = "dashboard.views.errors.not_found"
handler500 = "dashboard.views.errors.server_error"
