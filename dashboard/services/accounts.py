"""People: their preferences, their roles."""

from __future__ import annotations

from django.conf import settings
from django.contrib.auth.password_validation import validate_password
from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from dashboard.lifecycle import Refused, Role
from dashboard.models import User
from dashboard.models.accounts import Theme
from dashboard.services.units import authorise, recorded, required, unit_of_work


@unit_of_work
def preferences_update(*, actor: User, language: str, theme: str) -> User:
    """How pages look to ``actor``: a language of ``settings.LANGUAGES`` ('' = as the browser says) and a theme."""
    person = authorise(actor, "account.preferences")
    if language and language not in dict(settings.LANGUAGES):
        raise Refused(_("there is no language '%(language)s'") % {"language": language})
    if theme not in Theme.values:
        raise Refused(_("there is no theme '%(theme)s'") % {"theme": theme})
    person.language, person.theme = language, theme
    person.save(update_fields=["language", "theme"])
    return person


@unit_of_work
def user_create(*, actor: User | None, username: str, password: str, role: str, is_demo: bool = False) -> User:
    """A new person. ``actor`` None: at installation, from the command line."""
    if actor is not None:
        actor = authorise(actor, "users.manage")
    _check_role(role)
    person = User(username=username, role=role, is_demo=is_demo)
    try:
        validate_password(password, person)
        person.set_password(password)
        person.full_clean()
    except ValidationError as error:
        raise Refused(" ".join(error.messages)) from None
    with recorded(actor=actor, reason=f"new user {username}"):
        person.save()
    return person


@unit_of_work
def user_change_role(*, actor: User, user: User, role: str, reason: str) -> User:
    """Give ``user`` another role; nobody changes their own."""
    actor = authorise(actor, "users.manage")
    _check_role(role)
    if actor.pk == user.pk:
        raise Refused(_("nobody changes their own role: ask another administrator"))
    reason = required(reason, _("Say why: the reason is kept in the history."))
    person = User.objects.select_for_update(no_key=True).get(pk=user.pk)
    person.role = role
    with recorded(actor=actor, reason=reason):
        person.save(update_fields=["role"])
    return person


def _check_role(role: str) -> None:
    if role not in Role.values:
        raise Refused(_("there is no role '%(role)s'") % {"role": role})
